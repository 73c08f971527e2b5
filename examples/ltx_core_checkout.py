"""A checkout of Lightricks' ltx-core, stock and accelerated, compared bit for bit on a transformer with random weights.

    python examples/ltx_core_checkout.py LTX-2/packages/ltx-core/src
    python examples/ltx_core_checkout.py LTX-2/packages/ltx-core/src --layers 48 --tokens 6144    # on a GPU

Without a GPU the kernels run in Triton's interpreter, on a small transformer. Exit code 0: both streams are equal in
every bit after every step and something was fused; 1: not so.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import time

import torch

import bitfuse
from bitfuse.kernel import interpreter


def build(layers: int, heads: int, head_dim: int, device: str) -> torch.nn.Module:
    from ltx_core.model.transformer.model import LTXModel
    from ltx_core.model.transformer.rope import LTXRopeType

    torch.manual_seed(0)
    with torch.device(device):
        model = LTXModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            cross_attention_dim=heads * head_dim,
            audio_num_attention_heads=heads,
            audio_attention_head_dim=head_dim // 2,
            audio_cross_attention_dim=heads * head_dim // 2,
            rope_type=LTXRopeType.SPLIT,
            apply_gated_attention=True,
            cross_attention_adaln=True,
        ).to(torch.bfloat16)
        for p in model.parameters():  # AdaLN tables are made empty
            p.data.normal_(std=0.5 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return model.eval()


def inputs(tokens: int, widths: tuple[int, int], device: str) -> tuple:
    from ltx_core.model.transformer.modality import Modality

    def modality(tokens: int, dims: int, width: int) -> Modality:
        at = torch.arange(tokens, dtype=torch.float32, device=device).expand(1, dims, tokens)
        noise = torch.full((1, tokens), 0.7, dtype=torch.bfloat16, device=device)
        return Modality(
            latent=torch.randn(1, tokens, 128, dtype=torch.bfloat16, device=device),
            sigma=noise[:, 0],
            timesteps=noise,
            positions=torch.stack([at, at + 1], dim=-1),
            context=torch.randn(1, 64, width, dtype=torch.bfloat16, device=device),
        )

    video, audio = modality(tokens, 3, widths[0]), modality(max(2, tokens // 48), 1, widths[1])
    return video, audio, None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", help="the folder that holds the package ltx_core")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48, help="video tokens")
    given = parser.parse_args()
    sys.path.insert(0, given.checkout)
    try:
        import ltx_core.model.transformer.model as found
    except ImportError as error:
        parser.error(f"{given.checkout} does not hold the package ltx_core, or what that needs: {error}")
    print(f"ltx-core from {inspect.getfile(found)}")

    on_gpu = torch.cuda.is_available()
    device, heads, head_dim = ("cuda", 32, 128) if on_gpu else ("cpu", 4, 64)
    model = build(given.layers, heads, head_dim, device)
    feed = inputs(given.tokens, (heads * head_dim, heads * head_dim // 2), device)

    def step() -> tuple[tuple, float]:
        start = time.perf_counter()
        with torch.no_grad():
            out = model(*feed)
        if on_gpu:
            torch.cuda.synchronize()
        return out, time.perf_counter() - start

    with interpreter() if not on_gpu else contextlib.nullcontext():
        stock = [step() for _ in range(3)]
        with bitfuse.accelerated(model) as handle:
            fused = [step() for _ in range(3)]
    print(handle.report())
    mismatch = next(filter(None, (bitfuse.compare(stock[0][0], out) for out, _ in (*stock, *fused))), None)
    if mismatch:
        print(f"Not equal: {mismatch.sentence}")
    elif not handle.report().fused:
        print("Nothing was fused.")
    else:
        print("Both streams are equal in every bit, in three stock and three accelerated steps.")
    if on_gpu:
        print(f"Last step: {1e3 * stock[-1][1]:.1f} ms stock, {1e3 * fused[-1][1]:.1f} ms accelerated.")
    return 0 if not mismatch and handle.report().fused else 1


if __name__ == "__main__":
    sys.exit(main())

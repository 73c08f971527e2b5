"""A made-up framework with an LTX-2-like transformer in eager PyTorch: a host that bitfuse does not know.

`made_up_adapter` accelerates it, `made_up_seeded` builds and calls it, and `test_fourth_host` registers both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "1.0"


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H * D]; cos and sin [B, H, T, D / 2]."""
    heads = x.unflatten(2, (cos.shape[1], -1)).swapaxes(1, 2)
    first, second = heads.chunk(2, dim=-1)
    out = heads * torch.cat((cos, cos), dim=-1)
    a, b = out.chunk(2, dim=-1)
    a.addcmul_(-sin, second)
    b.addcmul_(sin, first)
    return out.swapaxes(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(width, heads * head_dim)
        self.to_k = nn.Linear(context_width, heads * head_dim)
        self.to_v = nn.Linear(context_width, heads * head_dim)
        self.q_norm = nn.RMSNorm(heads * head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(heads * head_dim, eps=1e-6)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, context: Tensor | None = None, rope=None, context_rope=None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.q_norm(self.to_q(x)), self.k_norm(self.to_k(context)), self.to_v(context)
        if rope is not None:
            q = rotate_halves(q, *rope)
            k = rotate_halves(k, *(rope if context_rope is None else context_rope))
        return self.to_out(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).swapaxes(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).swapaxes(1, 2).flatten(2)


class FeedForward(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class AVBlock(nn.Module):
    """Self-attention, cross-attention to the text, between video and audio, feed-forward; of both modalities."""

    eps = 1e-6

    def __init__(self, width: int, audio_width: int, heads: int, head_dim: int, audio_head_dim: int):
        super().__init__()
        for prefix, own, dim in (("", width, head_dim), ("audio_", audio_width, audio_head_dim)):
            setattr(self, f"{prefix}attn1", Attention(own, own, heads, dim))
            setattr(self, f"{prefix}attn2", Attention(own, own, heads, dim))
            setattr(self, f"{prefix}ff", FeedForward(own))
            setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.empty(6, own)))
            setattr(self, f"{prefix}cross_table", nn.Parameter(torch.empty(5, own)))
        self.audio_to_video_attn = Attention(width, audio_width, heads, audio_head_dim)
        self.video_to_audio_attn = Attention(audio_width, width, heads, audio_head_dim)

    def modulations(self, table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        return (table[None, None] + temb.unflatten(-1, (table.shape[0], -1))).unbind(2)

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, audio_text: Tensor, temb: dict, ropes: dict):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulations(self.scale_shift_table, temb["video"])
        video = video + self.attn1(self.norm(video) * (1 + scale) + shift, rope=ropes["video"]) * gate
        video = video + self.attn2(self.norm(video), context=text)
        audio_table = self.modulations(self.audio_scale_shift_table, temb["audio"])
        shift, scale, gate, audio_mlp_shift, audio_mlp_scale, audio_mlp_gate = audio_table
        audio = audio + self.audio_attn1(self.norm(audio) * (1 + scale) + shift, rope=ropes["audio"]) * gate
        audio = audio + self.audio_attn2(self.norm(audio), context=audio_text)

        a2v_scale, a2v_shift, v2a_scale, v2a_shift, a2v_gate = self.modulations(self.cross_table, temb["video_cross"])
        n = self.norm(video)
        for_a2v, for_v2a = n * (1 + a2v_scale) + a2v_shift, n * (1 + v2a_scale) + v2a_shift
        audio_cross = self.modulations(self.audio_cross_table, temb["audio_cross"])
        a2v_scale, a2v_shift, v2a_scale, v2a_shift, v2a_gate = audio_cross
        n = self.norm(audio)
        audio_for_a2v, audio_for_v2a = n * (1 + a2v_scale) + a2v_shift, n * (1 + v2a_scale) + v2a_shift
        ropes = ropes["video_cross"], ropes["audio_cross"]
        video = video + self.audio_to_video_attn(for_a2v, audio_for_a2v, *ropes) * a2v_gate
        audio = audio + self.video_to_audio_attn(audio_for_v2a, for_v2a, *ropes[::-1]) * v2a_gate

        video = video + self.ff(self.norm(video) * (1 + mlp_scale) + mlp_shift) * mlp_gate
        audio = audio + self.audio_ff(self.norm(audio) * (1 + audio_mlp_scale) + audio_mlp_shift) * audio_mlp_gate
        return video, audio


class Transformer(nn.Module):
    """LTX-2 as this framework has it: velocities of video and audio latents at a noise level."""

    def __init__(self, layers, heads, head_dim, audio_head_dim, channels, audio_channels, text_channels):
        super().__init__()
        self.sizes = heads, {"video": head_dim, "audio": audio_head_dim}
        widths = {"video": heads * head_dim, "audio": heads * audio_head_dim}
        self.patch = nn.ModuleDict({"video": nn.Linear(channels, widths["video"])})
        self.patch["audio"] = nn.Linear(audio_channels, widths["audio"])
        self.text = nn.ModuleDict({stream: nn.Linear(text_channels, width) for stream, width in widths.items()})
        rows = {"video": 6, "audio": 6, "video_cross": 5, "audio_cross": 5}
        of_times = {name: nn.Linear(1, count * widths[name[:5]]) for name, count in rows.items()}
        self.time = nn.ModuleDict(of_times)
        block = (widths["video"], widths["audio"], heads, head_dim, audio_head_dim)
        self.transformer_blocks = nn.ModuleList(AVBlock(*block) for _ in range(layers))
        self.out = nn.ModuleDict({"video": nn.Linear(widths["video"], channels)})
        self.out["audio"] = nn.Linear(widths["audio"], audio_channels)

    def rope(self, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        frequencies = 1000.0 ** -torch.linspace(0, 1, head_dim // 2, device=x.device)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        angles = angles.expand(x.shape[0], self.sizes[0], *angles.shape)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, audio_text: Tensor, level: Tensor):
        x, y = self.patch["video"](video), self.patch["audio"](audio)
        temb = {name: linear(level[:, None, None].to(x.dtype)) for name, linear in self.time.items()}
        dims = self.sizes[1]
        ropes = {"video": self.rope(x, dims["video"]), "audio": self.rope(y, dims["audio"])}
        ropes |= {"video_cross": self.rope(x, dims["audio"]), "audio_cross": self.rope(y, dims["audio"])}
        text, audio_text = self.text["video"](text), self.text["audio"](audio_text)
        for block in self.transformer_blocks:
            x, y = block(x, y, text, audio_text, temb, ropes)
        return self.out["video"](x), self.out["audio"](y)

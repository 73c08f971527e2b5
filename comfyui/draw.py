# SPDX-License-Identifier: GPL-3.0-or-later
"""Draws the pack's icon, its example workflow, and the picture of that in the README: python comfyui/draw.py

One table of nodes serves the workflow and the picture, so that they agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKPOINT = "ltx-2-19b-dev.safetensors"


@dataclass
class Node:
    """A node of the workflow.

    at        column and row in the picture
    inputs    name, type and where it comes from: the number of a node and of its output
    outputs   name and type
    values    of the node's widgets, in their order
    """

    kind: str
    at: tuple[int, float]
    inputs: list[tuple[str, str, int, int]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


NODES = {
    1: Node("CheckpointLoaderSimple", (0, 0), [], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")], [CHECKPOINT]),
    2: Node(
        "LTXAVTextEncoderLoader", (0, 1), [], [("CLIP", "CLIP")], ["gemma_3_12B_it.safetensors", CHECKPOINT, "default"]
    ),
    3: Node("LTXVAudioVAELoader", (0, 3), [], [("Audio VAE", "VAE")], [CHECKPOINT]),
    4: Node(
        *("CLIPTextEncode", (1, 1), [("clip", "CLIP", 2, 0)], [("CONDITIONING", "CONDITIONING")]),
        ["A tram crosses a bridge in the rain, its bell ringing; the camera follows it."],
    ),
    5: Node(
        "CLIPTextEncode",
        (1, 2),
        [("clip", "CLIP", 2, 0)],
        [("CONDITIONING", "CONDITIONING")],
        ["blurry, still picture"],
    ),
    6: Node(
        "LTXVConditioning",
        (2, 1.5),
        [("positive", "CONDITIONING", 4, 0), ("negative", "CONDITIONING", 5, 0)],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
        [25],
    ),
    7: Node("EmptyLTXVLatentVideo", (1, 4), [], [("LATENT", "LATENT")], [768, 512, 121, 1]),
    8: Node("LTXVEmptyLatentAudio", (1, 3), [("audio_vae", "VAE", 3, 0)], [("Latent", "LATENT")], [121, 25, 1]),
    9: Node(
        "LTXVConcatAVLatent",
        (2, 3.5),
        [("video_latent", "LATENT", 7, 0), ("audio_latent", "LATENT", 8, 0)],
        [("latent", "LATENT")],
    ),
    10: Node("BitfuseLTX2", (2, 0), [("model", "MODEL", 1, 0)], [("MODEL", "MODEL")], [False, 0, False]),
    11: Node(
        "KSampler",
        (3, 1.5),
        [
            ("model", "MODEL", 10, 0),
            ("positive", "CONDITIONING", 6, 0),
            ("negative", "CONDITIONING", 6, 1),
            ("latent_image", "LATENT", 9, 0),
        ],
        [("LATENT", "LATENT")],
        [42, "fixed", 20, 4.0, "euler", "simple", 1.0],
    ),
    12: Node(
        "BitfuseReport", (4, 0), [("model", "MODEL", 10, 0), ("after", "LATENT", 11, 0)], [("report", "STRING")], []
    ),
    13: Node(
        "LTXVSeparateAVLatent",
        (4, 1.5),
        [("av_latent", "LATENT", 11, 0)],
        [("video_latent", "LATENT"), ("audio_latent", "LATENT")],
    ),
    14: Node("VAEDecode", (5, 1), [("samples", "LATENT", 13, 0), ("vae", "VAE", 1, 2)], [("IMAGE", "IMAGE")]),
    15: Node(
        "LTXVAudioVAEDecode", (5, 2.5), [("samples", "LATENT", 13, 1), ("audio_vae", "VAE", 3, 0)], [("Audio", "AUDIO")]
    ),
    16: Node(
        "CreateVideo", (6, 1.5), [("images", "IMAGE", 14, 0), ("audio", "AUDIO", 15, 0)], [("VIDEO", "VIDEO")], [25]
    ),
    17: Node("SaveVideo", (7, 1.5), [("video", "VIDEO", 16, 0)], [], ["video/bitfuse", "auto", "auto"]),
    18: Node("PreviewAny", (5, 0), [("source", "STRING", 12, 0)], []),
}
TITLES = {"BitfuseLTX2": "bitfuse (LTX-2)", "BitfuseReport": "bitfuse report"}


def workflow() -> dict[str, Any]:
    """As ComfyUI saves one."""
    given = [(target, i, one) for target, node in NODES.items() for i, one in enumerate(node.inputs)]
    links = [[n, one[2], one[3], target, i, one[1]] for n, (target, i, one) in enumerate(given, 1)]
    nodes = []
    for number, node in NODES.items():
        into = {link[4]: link[0] for link in links if link[3] == number}
        out = [[link[0] for link in links if link[1:3] == [number, i]] for i in range(len(node.outputs))]
        nodes.append(
            {
                "id": number,
                "type": node.kind,
                "pos": [360 * node.at[0], 260 * node.at[1]],
                "size": [300, 200],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": [{"name": one[0], "type": one[1], "link": into[i]} for i, one in enumerate(node.inputs)],
                "outputs": [
                    {"name": name, "type": kind, "slot_index": i, "links": out[i]}
                    for i, (name, kind) in enumerate(node.outputs)
                ],
                "properties": {"Node name for S&R": node.kind},
                "widgets_values": node.values,
            }
        )
    counts = {"last_node_id": max(NODES), "last_link_id": len(links)}
    return {**counts, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def graph() -> str:
    """The workflow as a picture: a box for each node, a line for each link."""
    wide, high, gap, line = 168, 34, 26, 62

    def corner(node: Node) -> tuple[float, float]:
        return 12 + node.at[0] * (wide + gap), 12 + node.at[1] * line

    width = 12 + 8 * (wide + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 316" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="316" fill="#ffffff"/>',
    ]
    for node in NODES.values():
        x, y = corner(node)
        for _, kind, source, _ in node.inputs:
            from_x, from_y = corner(NODES[source])
            start, end = (from_x + wide, from_y + high / 2), (x, y + high / 2)
            ours = kind == "MODEL"
            color, thick = ("#b0413e", 2.5) if ours else ("#9aa5b1", 1.2)
            bend = max(20.0, (end[0] - start[0]) / 2)
            curve = f"M{start[0]:g},{start[1]:g} C{start[0] + bend:g},{start[1]:g} {end[0] - bend:g},{end[1]:g}"
            parts.append(
                f'<path d="{curve} {end[0]:g},{end[1]:g}" fill="none" stroke="{color}" stroke-width="{thick}"/>'
            )
    for node in NODES.values():
        x, y = corner(node)
        ours = node.kind in TITLES
        fill, edge = ("#fbe9e7", "#b0413e") if ours else ("#f3f5f7", "#6b7885")
        box = f'x="{x:g}" y="{y:g}" width="{wide}" height="{high}" rx="6"'
        parts.append(f'<rect {box} fill="{fill}" stroke="{edge}"/>')
        text = TITLES.get(node.kind, node.kind)
        parts.append(f'<text x="{x + wide / 2:g}" y="{y + 21:g}" text-anchor="middle" fill="#1f2933">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def icon() -> str:
    """Two rows of bits, equal, and one line under them."""
    bits = (1, 0, 1, 1, 0)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">',
        '<rect width="128" height="128" rx="20" fill="#1f2933"/>',
    ]
    for row in range(2):
        for i, bit in enumerate(bits):
            fill = "#f0b429" if bit else "#52606d"
            parts.append(f'<rect x="{16 + 20 * i}" y="{24 + 28 * row}" width="16" height="20" rx="3" fill="{fill}"/>')
    parts.append('<rect x="16" y="88" width="96" height="14" rx="7" fill="#b0413e"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


FILES = {
    "icon.svg": icon,
    "graph.svg": graph,
    "example_workflows/ltx2_bitfuse.json": lambda: json.dumps(workflow(), indent=1) + "\n",
}

if __name__ == "__main__":
    for name, make in FILES.items():
        (HERE / name).write_text(make())

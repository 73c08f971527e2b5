"""walk"""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any
import torch
from torch import Tensor
from bitfuse.ops.convolution import convolve
from bitfuse.ops import pixel_norm as ops


@dataclass
class Pending:
    y: Tensor
    bias: Tensor | None = None
    noise: Tensor | None = None
    noise_scale: Tensor | None = None
    residual: Tensor | None = None
    def taken(self):
        import copy
        c=copy.copy(self); self.y=self.residual=None
        return c


class Walk:
    def __init__(self, causal, call, conv):
        self.causal, self.call, self.conv = causal, call, conv

    def pads(self, conv):
        t = conv.kernel_size[0]
        front, back = (t - 1, 0) if self.causal else ((t - 1) // 2, (t - 1) // 2)
        return front, back, int(conv.conv.padding_mode == "reflect")

    def into(self, p, conv, scale=None, shift=None, eps=1e-8):
        pads = self.pads(conv)
        rest = p.bias, p.noise, p.noise_scale, scale, shift, *pads, eps
        if p.residual is not None:
            return self.call(ops.RESIDUAL_PIXEL_NORM_SILU_PAD, p.y, p.residual, *rest)
        return p.y, self.call(ops.PIXEL_NORM_SILU_PAD, p.y, *rest)

    def convolve(self, x, conv):
        c = conv.conv
        padding = c.padding if c.padding_mode == "zeros" else (0, 0, 0)
        return self.conv(x, c.weight, c.bias, c.stride, padding)

    def resnet(self, r, p):
        x, padded = self.into(p.taken(), r.conv1)
        p = Pending(*self.convolve(padded, r.conv1)[:2])
        del padded
        _, padded = self.into(p.taken(), r.conv2)
        y, bias, _ = self.convolve(padded, r.conv2)
        return Pending(y, bias, residual=x)

    def upsampler(self, u, p):
        front, back, edge = pads = self.pads(u.conv)
        p = p.taken()
        padded = self.call(ops.RESIDUAL_PAD, p.y, p.residual, p.bias, p.noise, p.noise_scale, *pads)
        x = None
        if u.residual:
            d, h, w = padded.shape[2:]
            x = padded[:, :, front : d - back, edge : h - edge, edge : w - edge]
        y, bias, _ = self.convolve(padded, u.conv)
        return Pending(self.call(ops.UPSAMPLE, y, x, bias, *u.stride))

    def decoder(self, m, z):
        p = Pending(ops.laid(m.conv_in(z, causal=self.causal)))
        for r in m.mid_block.resnets:
            p = self.resnet(r, p)
        for b in m.up_blocks:
            for u in b.upsamplers or ():
                p = self.upsampler(u, p)
            for r in b.resnets:
                p = self.resnet(r, p)
        _, padded = self.into(p.taken(), m.conv_out)
        y, bias, _ = self.convolve(padded, m.conv_out)
        del padded
        return self.call(ops.UNPATCHIFY, y, bias, m.patch_size_t, m.patch_size)

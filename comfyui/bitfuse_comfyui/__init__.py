# SPDX-License-Identifier: GPL-3.0-or-later
"""bitfuse for ComfyUI: a node pack, and the adapter by which bitfuse knows ComfyUI as a host.

It restates forwards of ComfyUI's, which is GPL-3.0, and so is this package. bitfuse itself is Apache-2.0.
"""

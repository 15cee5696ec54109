"""Adapter files as programs lay them out (diffusers, kohya, ComfyUI): names, reading, writing, and the algebra between.

Every layout is read into the same value, a list of `Layer`, named by the paths of the diffusers model, and every layout
is written from it: a conversion is a reading and a writing.
"""

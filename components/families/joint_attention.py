"""What diffusers' joint-attention transformers call their layers: patterns for adapter targets."""

ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = tuple(
    rf"{stream}\.net\.{layer}" for stream in ("ff", "ff_context") for layer in (r"0\.proj", "2")
)
BLOCKS = (r"(?:single_)?transformer_blocks\..*",)  # every layer of every block, modulation too
EVERYTHING = (".*",)

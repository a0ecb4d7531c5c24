"""From token ids to the hidden states that predict a completion, and the head that reads them."""

from .heads import announce_head, backbone_of, causal_lm, head_of, unsharded
from .images import Images, image_inputs, images_apart, images_together, joined_images
from .layers import reads_more_than_text
from .logits import check_logits, check_packing
from .networks import Networks
from .packed import can_pack, packed_states
from .passes import cut_by_tokens, cut_into, keep_groups_together, padded_length, rows_of, used_width
from .positions import positions
from .shared_prefix import can_share_prompts, pays_off, states_with_shared_prompts
from .states import completion_states, evaluation_mode


__all__ = [
    "Images",
    "Networks",
    "announce_head",
    "backbone_of",
    "can_pack",
    "can_share_prompts",
    "causal_lm",
    "check_logits",
    "check_packing",
    "completion_states",
    "cut_by_tokens",
    "cut_into",
    "evaluation_mode",
    "head_of",
    "image_inputs",
    "images_apart",
    "images_together",
    "joined_images",
    "keep_groups_together",
    "packed_states",
    "padded_length",
    "pays_off",
    "positions",
    "reads_more_than_text",
    "rows_of",
    "states_with_shared_prompts",
    "unsharded",
    "used_width",
]

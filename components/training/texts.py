"""The text side of a training: LoRA on the CLIP text encoders, and tokens of its own with the rows that they learn.

With it prompts are encoded in every step, by the function whose results are otherwise cached. Tokens that are learnt
together with a LoRA are the pivotal tuning of Roich et al. 2021, arXiv:2106.05744, with textual inversion (Gal et al.
2022, arXiv:2208.01618) in the pivot's place. The vocabulary's own rows are no parameters: they stay to the bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.families.bases import BaseModel
from components.families.text import ClipPrompts, TextModel
from components.latents.keys import NULL_PROMPT
from components.latents.ragged import Tensors, replaced
from components.layouts.tokens import Token
from components.training.adapters import ADAPTER_NAME, KINDS, attach_part, limit_norms, text_parts_of, tokens_of
from components.training.imports import imported_adapter, with_dropout

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of a CLIP layer; what diffusers' trainers adapt
FEED_FORWARD = ["fc1", "fc2"]  # and kohya's beside
PULL = 0.1  # the power with which diffusers' trainers pull new rows back after every step


class Rows(nn.Module):
    """An embedding whose vocabulary is frozen, with float32 rows that train for the ids from `first` on.

    The vocabulary comes first among the parameters: pipelines take the first one's precision for the model's.
    """

    def __init__(self, known: nn.Embedding, first: int, rows: Tensor):
        super().__init__()
        self.known, self.first = known, first
        self.learnt = nn.Embedding.from_pretrained(rows.float().to(known.weight.device), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        known = self.known(ids.clamp(max=self.first - 1))
        learnt = self.learnt((ids - self.first).clamp(min=0))
        return torch.where((ids < self.first).unsqueeze(-1), known, learnt.to(known))

    @torch.no_grad()
    def settle(self) -> None:
        """Pull the spread of the rows towards the vocabulary's: rows that grow drown the other words of a prompt."""
        self.learnt.weight.mul_((self.known.weight.float().std() / self.learnt.weight.std()) ** PULL)


class TextSide:
    """Text encoders in training: `adapted` are those with a LoRA, by their part of the pipeline."""

    def __init__(
        self,
        base: BaseModel,
        prompts: ClipPrompts,
        adapted: Mapping[str, nn.Module],
        tokens: Sequence[Token],
        limit: float | None,
    ):
        self.adapted, self._base, self._prompts, self._limit = adapted, base, prompts, limit
        self._names = [(token.name, {part: len(rows) for part, rows in token.vectors.items()}) for token in tokens]
        self._rows = {clip.part: rows for clip in prompts.clips if (rows := _learning(clip, tokens))}

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What trains, by part and name."""
        return [
            (f"{clip.part}.{name}", parameter)
            for clip in self._prompts.clips
            for name, parameter in clip.model.named_parameters()
            if parameter.requires_grad
        ]

    @property
    def tokens(self) -> list[Token]:
        """The tokens as they are now."""
        left = {part: rows.learnt.weight.detach().cpu() for part, rows in self._rows.items()}
        tokens = []
        for name, counts in self._names:
            tokens.append(Token(name, {part: left[part][:count].clone() for part, count in counts.items()}))
            left = {part: rows[counts.get(part, 0) :] for part, rows in left.items()}
        return tokens

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        """What a stock pipeline takes in the place of its own, to draw with what was learnt so far."""
        clips = self._prompts.clips
        return {clip.part: clip.model for clip in clips} | {clip.tokenizer_part: clip.tokenizer for clip in clips}

    def train(self, mode: bool) -> None:
        for clip in self._prompts.clips:
            clip.model.train(mode)

    def condition(self, texts: Sequence[str], cached: Tensors, dropped: Tensor | None = None) -> Tensors:
        """What the denoiser is told of the texts, with gradients.

        `cached` (B, ...) is what the cache has of the same texts, on the device; of it stays what other encoders made.
        Rows that are `dropped` (B,) bool get what guidance takes for the empty prompt; `cached` has theirs already.
        """
        gone = [False] * len(texts) if dropped is None else dropped.tolist()
        shown = [NULL_PROMPT if drop else text for text, drop in zip(texts, gone, strict=True)]
        live = {name: tensor.float() for name, tensor in self._prompts.condition(shown, cached).items()}
        if dropped is not None:
            null = self._base.architecture.null_condition(self._base.path, live)
            live = replaced(live, dropped.to(next(iter(live.values())).device), null)
        return cached | live

    def settle(self) -> None:
        """What is done to the parameters after every step."""
        for rows in self._rows.values():
            rows.settle()
        if self._limit is not None:
            for model in self.adapted.values():
                limit_norms(model, self._limit)


def text_side(
    base: BaseModel, training: TrainingConfig, device: str, dtype: torch.dtype, texts: Iterable[str]
) -> TextSide | None:
    """What of the text encoders trains on captions such as `texts`; None: nothing, so their embeddings are cached.

    Raises BadInput for a family whose text encoders are no CLIP, for a token that it cannot take in or that no caption
    has, and for an adapter to go on from that has another text side than the recipe.
    """
    data = imported_adapter(Path(training.init_adapter), base)[0] if training.init_adapter else None
    held = tokens_of(data, base.architecture) if data else ()
    parts = text_parts_of(data, base.architecture) if data else ()
    if not (training.train_text_encoder or training.placeholder_token or held or parts):
        return None
    _require_family(base, training, held)
    prompts = base.architecture.load_clip_prompts(base.path, device, dtype)
    for clip in prompts.clips:
        clip.model.requires_grad_(False)
        if training.gradient_checkpointing:
            clip.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    wanted = parts if data else base.architecture.clip_parts if training.train_text_encoder else ()
    adapted = {clip.part: clip.model for clip in prompts.clips if clip.part in wanted}
    for place, (part, model) in enumerate(adapted.items()):
        if data is not None:
            attach_part(model, part, with_dropout(data, training.lora_dropout))
        else:
            torch.manual_seed(training.seed + place)
            config = KINDS[training.adapter].configure(training, _targets(training))
            model.add_adapter(config, adapter_name=ADAPTER_NAME)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.data = parameter.data.float()
    tokens = held or _first_tokens(prompts, training)
    if training.placeholder_token and not any(training.placeholder_token in text.lower() for text in texts):
        raise BadInput(
            f"training.placeholder_token is {training.placeholder_token!r}, but no training caption has it, so that it "
            "would not learn; write it into the captions"
        )
    return TextSide(base, prompts, adapted, tokens, training.scale_weight_norms)


def _require_family(base: BaseModel, training: TrainingConfig, held: Sequence[Token]) -> None:
    family = base.architecture
    if not family.clip_parts:
        key = "train_text_encoder" if training.train_text_encoder else "placeholder_token"
        raise BadInput(
            f"training.{key} is set, but {family.name} reads prompts with a language model, which is not trained; "
            "leave it out"
        )
    names = [*filter(None, [training.placeholder_token]), *(token.name for token in held)]
    if names and not hasattr(getattr(diffusers, family.pipeline), "load_textual_inversion"):
        raise BadInput(
            f"diffusers' {family.pipeline} loads no learned tokens such as {names[0]!r}; leave "
            "training.placeholder_token out, train_text_encoder works"
        )


def _targets(training: TrainingConfig) -> list[str]:
    """The layers of a text encoder that take a LoRA: as kohya's trainers, or, like the denoiser's, attention alone."""
    return ATTENTION if training.targets == "attention" else ATTENTION + FEED_FORWARD


def _first_tokens(prompts: ClipPrompts, training: TrainingConfig) -> list[Token]:
    """The recipe's token before training, for every CLIP text encoder."""
    if training.placeholder_token is None:
        return []
    return [Token(training.placeholder_token, {clip.part: _first_rows(clip, training) for clip in prompts.clips})]


def _first_rows(clip: TextModel, training: TrainingConfig) -> Tensor:
    """(num_vectors, width): the initializer's rows over and over, or noise with the spread of the vocabulary."""
    weight, count = clip.model.get_input_embeddings().weight.detach().float().cpu(), training.num_vectors
    if training.initializer_token is None:
        generator = torch.Generator().manual_seed(training.seed)
        return torch.randn(count, weight.shape[1], generator=generator) * weight.std()
    ids = clip.tokenizer(training.initializer_token, add_special_tokens=False).input_ids
    if not 0 < len(ids) <= count:
        raise BadInput(
            f"training.initializer_token {training.initializer_token!r} is {len(ids)} tokens for the {clip.part}, "
            f"num_vectors is {count}; choose a single word, or as many vectors"
        )
    return weight[[ids[i % len(ids)] for i in range(count)]]


def _learning(clip: TextModel, tokens: Sequence[Token]) -> Rows | None:
    """Give a text encoder the tokens that have vectors for it, under the names that stock pipelines give these."""
    held = [(token.name, token.vectors[clip.part]) for token in tokens if clip.part in token.vectors]
    if not held:
        return None
    known, first = clip.model.get_input_embeddings(), len(clip.tokenizer)
    for name, rows in held:
        for word in [name, *(f"{name}_{i}" for i in range(1, len(rows)))]:
            if word in clip.tokenizer.get_vocab():
                raise BadInput(f"the token {word!r} is in the {clip.tokenizer_part}'s vocabulary; choose another name")
            clip.tokenizer.add_tokens(word)
    clip.learned = True
    learning = Rows(known, first, torch.cat([rows for _, rows in held]))
    clip.model.set_input_embeddings(learning)
    return learning

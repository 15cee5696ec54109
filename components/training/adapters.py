"""Adapters on a frozen denoiser, through PEFT as the stock pipelines do: one line in a table for each kind.

LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024,
arXiv:2402.09353), PiSSA (Meng et al. 2024, arXiv:2404.02948), LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098), LoKr
(Yeh et al. 2023, arXiv:2309.14859) and OFT (Qiu et al. 2023, arXiv:2306.07280).

A file of ours always comes back exactly with `attach_adapter`. `load_lora_weights` of the stock pipelines reads the
kinds that are LoRAs and refuses the others; `stock_adapter` gives the same update in a file that it reads.
"""

import difflib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load
from torch import Tensor, nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.families.family import Family
from components.layouts.skeleton import encoder_module
from components.layouts.tokens import Token, bundled, unbundled
from components.layouts.writing import MAGNITUDE_OF_TEXT
from components.tensors import to_safetensors

ADAPTER_NAME = "default"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps rank, alpha and the rest of PEFT's configuration
STOCK_TYPE = "LORA"  # the one PEFT type that `load_lora_weights` reads
PEFT_TYPES = frozenset({STOCK_TYPE, "LOHA", "LOKR", "OFT"})
PISSA_START = ("pissa_start_A", "pissa_start_B")  # buffers: the first factors, which the base's weights have lost


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of adapter: PEFT's configuration of it, and the layers besides linear ones that it can go to."""

    configure: Callable[[TrainingConfig, list[str]], PeftConfig]
    kernels: int = 1024  # the widest convolution that it takes; 0: none


def _lora(training: TrainingConfig, targets: list[str], **changes: Any) -> LoraConfig:
    return LoraConfig(
        r=training.rank,
        lora_alpha=training.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=training.lora_dropout,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        **{"init_lora_weights": "gaussian", **_patterns(training), **changes},
    )


def _lycoris(config: type[LoHaConfig | LoKrConfig], training: TrainingConfig, targets: list[str]) -> PeftConfig:
    alpha: Any = training.lora_alpha
    return config(r=training.rank, alpha=alpha, target_modules=targets, **_patterns(training))


def _oft(training: TrainingConfig, targets: list[str]) -> OFTConfig:
    """Blocks of `rank` x `rank`, or of the nearest size that divides a layer's width, rotated by Cayley's formula."""
    return OFTConfig(r=0, oft_block_size=training.rank, target_modules=targets, use_cayley_neumann=False)


def _patterns(training: TrainingConfig) -> dict[str, Any]:
    return {"rank_pattern": dict(training.rank_pattern), "alpha_pattern": dict(training.alpha_pattern)}


KINDS: dict[str, Kind] = {
    "lora": Kind(_lora),
    "rslora": Kind(lambda training, targets: _lora(training, targets, use_rslora=True)),
    "dora": Kind(lambda training, targets: _lora(training, targets, use_dora=True)),
    "pissa": Kind(lambda training, targets: _lora(training, targets, init_lora_weights="pissa"), kernels=0),
    "loha": Kind(lambda training, targets: _lycoris(LoHaConfig, training, targets)),
    "lokr": Kind(lambda training, targets: _lycoris(LoKrConfig, training, targets)),
    "oft": Kind(_oft, kernels=1),  # PEFT 0.21 turns wider ones into something else than the base, even untrained
}


# making -----------------------------------------------------------------------------------------------------------


def add_adapter(denoiser: Any, family: Family, training: TrainingConfig) -> list[tuple[str, nn.Parameter]]:
    """Freeze `denoiser` and give it a fresh adapter; returns the parameters that train, by name.

    Training starts at the base: what is added to every layer is zero. Raises BadInput when the preset or a suffix
    names no layer, when a layer is none the kind can go to, and for a rank that no layer is wide enough for.
    """
    targets = _targets(denoiser, family, training)
    _require_fitting(denoiser, targets, training)
    torch.manual_seed(training.seed)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(KINDS[training.adapter].configure(training, targets), adapter_name=ADAPTER_NAME)
    for parameter in (parameter for parameter in denoiser.parameters() if parameter.requires_grad):
        parameter.data = parameter.data.float()  # PEFT makes an adapter in the precision of the frozen layer
    if training.adapter == "pissa":
        for _, layer in _layers(denoiser):
            for name, factor in zip(PISSA_START, (layer.lora_A, layer.lora_B), strict=True):
                layer.register_buffer(name, factor[ADAPTER_NAME].weight.detach().clone(), persistent=False)
    return [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.requires_grad]


def limit_norms(denoiser: nn.Module, limit: float) -> None:
    """Scale the factors of every layer whose update's norm exceeds `limit` so that it is `limit` (max-norm).

    The norm of s B A needs no product of that size: its square is s^2 times the sum of (B^T B) * (A A^T).
    """
    with torch.no_grad():
        for _, layer in _layers(denoiser):
            down, up = (factor[ADAPTER_NAME].weight for factor in (layer.lora_A, layer.lora_B))
            a, b = down.flatten(1), up.flatten(1)  # (r, in), (out, r)
            norm = layer.scaling[ADAPTER_NAME] * ((b.T @ b) * (a @ a.T)).sum().sqrt().item()
            if norm > limit:
                down.mul_(math.sqrt(limit / norm))
                up.mul_(math.sqrt(limit / norm))


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers, by the name that they have in the base."""
    yield from ((name, module) for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer))


def _targets(denoiser: nn.Module, family: Family, training: TrainingConfig) -> list[str]:
    if isinstance(training.targets, str):
        targets = family.target_modules(denoiser, training.targets)
        if not targets:
            raise BadInput(
                f"training.targets {training.targets!r} matches no layer of this base; choose another preset"
            )
        return targets
    adaptable = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for suffix in training.targets:
        if not any(_ends_with(name, suffix) for name in adaptable):
            known = sorted({".".join(name.split(".")[-depth:]) for name in adaptable for depth in (1, 2)})
            raise BadInput(f"training.targets: {suffix!r} is the end of no layer's name{_did_you_mean(suffix, known)}")
    return [name for name in adaptable if any(_ends_with(name, suffix) for suffix in training.targets)]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known[:6])} and others"


def _require_fitting(denoiser: nn.Module, targets: list[str], training: TrainingConfig) -> None:
    kernels = KINDS[training.adapter].kernels
    modules: dict[str, Any] = {name: denoiser.get_submodule(name) for name in targets}
    for name, module in modules.items():
        size = max(module.kernel_size) if isinstance(module, nn.Conv2d) else 0
        if size > kernels:
            raise BadInput(
                f"training.adapter {training.adapter!r} cannot go to {name}, a convolution of kernel {size}; "
                "choose training.targets 'attention-mlp', or another adapter"
            )
    widths = {name: min(module.weight.shape[0], module.weight[0].numel()) for name, module in modules.items()}
    if training.rank > max(widths.values()):
        widest = max(widths, key=widths.__getitem__)
        raise BadInput(
            f"training.rank is {training.rank}, but the widest layer it goes to, {widest}, has {widths[widest]}; "
            "choose a smaller rank"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(training, setting)
        for key in pattern:
            reached = [name for name in targets if get_pattern_key(list(pattern), name) == key]
            if not reached:
                raise BadInput(f"training.{setting}: {key!r} decides no layer{_did_you_mean(key, targets)}")
            narrow = next((name for name in reached if setting == "rank_pattern" and pattern[key] > widths[name]), None)
            if narrow:
                raise BadInput(
                    f"training.{setting}: {key!r} is {pattern[key]}, but {narrow} has {widths[narrow]}; "
                    "choose a smaller rank"
                )


# files ------------------------------------------------------------------------------------------------------------


def adapter_bytes(
    denoiser: nn.Module, family: Family, texts: Mapping[str, nn.Module] = {}, tokens: Sequence[Token] = ()
) -> bytes:
    """The adapter as a safetensors file: float32, with PEFT's configuration in `lora_adapter_metadata`.

    `texts` are the text encoders that have an adapter too, by their part of the pipeline; `tokens` were learnt with it.
    """
    tensors, metadata = family.adapter_file(denoiser, ADAPTER_NAME)
    if any(hasattr(layer, PISSA_START[0]) for _, layer in _layers(denoiser)):
        tensors, metadata = _without_start(denoiser, f"{family.denoiser_part}.", tensors, metadata)
    for part, model in texts.items():
        layers, settings = family.adapter_file(model, ADAPTER_NAME, part)
        tensors |= {f"{part}.{stored_text_key(key.removeprefix(f'{part}.'))}": layers[key] for key in layers}
        metadata |= settings
    tensors |= bundled(tokens, family.pipeline)
    return to_safetensors(tensors, {"format": "pt", METADATA_KEY: json.dumps(_plain(metadata), sort_keys=True)})


def _without_start(
    denoiser: nn.Module, prefix: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A PiSSA adapter as a LoRA of twice the rank on the untouched base: B A - B0 A0 = [B, -B0] [A; A0].

    The base in training is W - s B0 A0; whoever loads the file has W.
    """
    for name, layer in _layers(denoiser):
        down, up = f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.lora_B.weight"
        start_a, start_b = (getattr(layer, start).to(tensors[down]) for start in PISSA_START)
        tensors[down] = torch.cat([tensors[down], start_a])
        tensors[up] = torch.cat([tensors[up], -start_b], dim=1)
    doubled = {key: 2 * metadata[f"{prefix}{key}"] for key in ("r", "lora_alpha")} | {
        key: {layer: 2 * value for layer, value in metadata[f"{prefix}{key}"].items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return tensors, metadata | {f"{prefix}{key}": value for key, value in doubled.items()} | {
        f"{prefix}init_lora_weights": True
    }


def attach_adapter(denoiser: Any, family: Family, data: bytes) -> None:
    """Give `denoiser` the adapter in a file of ours, of any kind, exactly as it was when the file was written.

    Raises BadInput for a file whose kind is not in the table, and for one of another model.
    """
    attach_part(denoiser, family.denoiser_part, data)


def attach_part(model: Any, part: str, data: bytes) -> None:
    """The same for any part of the pipeline, such as a text encoder."""
    prefix = f"{part}."
    settings = {key.removeprefix(prefix): value for key, value in settings_of(data).items() if key.startswith(prefix)}
    if settings.get("peft_type") not in PEFT_TYPES:
        raise BadInput(
            f"the adapter's {METADATA_KEY} says peft_type {settings.get('peft_type')!r} for {prefix[:-1]}, expected "
            f"one of {', '.join(sorted(PEFT_TYPES))}; train or export it again"
        )
    model.add_adapter(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]](**settings), adapter_name=ADAPTER_NAME)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load(data).items() if key.startswith(prefix)}
    if part.startswith("text_encoder"):
        tensors = {text_key(key, model): tensor for key, tensor in tensors.items()}
    loaded = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER_NAME)
    lacking = [key for key in loaded.missing_keys if f".{ADAPTER_NAME}" in key]
    if lacking or loaded.unexpected_keys:
        odd = [*lacking, *loaded.unexpected_keys]
        raise BadInput(f"the adapter does not fit this base: {len(odd)} tensors such as {odd[0]}; choose its own base")


def stock_adapter(data: bytes, family: Family, base: Path) -> bytes:
    """An adapter file that `load_lora_weights` reads: the same bytes, or the same update spelled out.

    A kind that the stock loader refuses ("Invalid LoRA checkpoint") becomes a LoRA whose rank is each layer's width:
    dW = dW I or I dW, so nothing is approximated, at the price of the weights' own size. The header key
    `safelight.spelled_out_from` names the kind. Learned tokens, which it refuses as well, are left out.
    """
    settings, (tensors, tokens) = settings_of(data), unbundled(load(data), family.pipeline, "the adapter")
    kinds = {key.removesuffix(".peft_type"): kind for key, kind in settings.items() if key.endswith(".peft_type")}
    strange = {part: kind for part, kind in kinds.items() if kind != STOCK_TYPE}
    if not strange and not tokens:
        return data
    for part in strange:
        prefix = f"{part}."
        kept = {key: value for key, value in settings.items() if not key.startswith(prefix)}
        model = _part_of(base, family, part)
        attach_part(model, part, data)
        layers, config = _spelled_out(model)
        settings = kept | {f"{prefix}{key}": _plain(value) for key, value in config.to_dict().items()}
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)} | {
            f"{prefix}{stored_text_key(key) if part in family.clip_parts else key}": tensor
            for key, tensor in layers.items()
        }
    header = header_of(data) | {METADATA_KEY: json.dumps(settings, sort_keys=True)}
    return to_safetensors(tensors, header | ({"safelight.spelled_out_from": min(strange.values())} if strange else {}))


def _part_of(base: Path, family: Family, part: str) -> Any:
    if part == family.denoiser_part:
        return family.load_denoiser(base, "cpu")
    return next(clip.model for clip in family.load_clip_prompts(base, "cpu", torch.float32).clips if clip.part == part)


def _spelled_out(model: nn.Module) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter of `model` as a LoRA of its layers' own width."""
    tensors, ranks = {}, {}
    for name, layer in _layers(model):
        down, up = _factors(_update(layer))
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        ranks[name] = len(down)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: found for name, found in ranks.items() if found != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others)
    )
    return tensors, config


def load_adapter(pipeline: Any, data: bytes, family: Family, base: Path) -> None:
    """Put any adapter file of ours into the stock pipeline of `base`, the stock way, with the tokens that it brings.

    What the pipeline then draws is what it draws for everybody who loads the registered or exported model.
    """
    for token in tokens_of(data, family):
        if not hasattr(pipeline, "load_textual_inversion"):
            raise BadInput(f"the adapter brings the token {token.name}, and {family.pipeline} loads none; leave it out")
        for part, vectors in token.vectors.items():
            pipeline.load_textual_inversion(
                vectors,
                token=token.name,
                text_encoder=getattr(pipeline, part),
                tokenizer=getattr(pipeline, part.replace("text_encoder", "tokenizer")),
            )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ADAPTER_FILE).write_bytes(stock_adapter(data, family, base))
        pipeline.load_lora_weights(folder, weight_name=ADAPTER_FILE)


def _update(layer: Any) -> Tensor:
    """What merging the adapter adds to a layer's weights."""
    with torch.no_grad():
        before = layer.get_base_layer().weight.clone()
        layer.merge(adapter_names=[ADAPTER_NAME])
        return layer.get_base_layer().weight - before


def _factors(update: Tensor) -> tuple[Tensor, Tensor]:
    """`down` (r, in, ...) and `up` (out, r, ...) whose product is the update; one of them is the identity."""
    out, width = len(update), update[0].numel()
    kernel = (1,) * (update.dim() - 2)
    if out <= width:
        return update, torch.eye(out).view(out, out, *kernel)
    return torch.eye(width).view(width, *update.shape[1:]), update.reshape(out, width, *kernel)


def tokens_of(data: bytes, family: Family) -> tuple[Token, ...]:
    """The learned tokens in an adapter file of ours."""
    return unbundled(load(data), family.pipeline, "the adapter")[1]


def text_parts_of(data: bytes, family: Family) -> tuple[str, ...]:
    """The text encoders that an adapter file of ours has layers for."""
    found = {key.split(".")[0] for key in load(data)}
    return tuple(part for part in family.clip_parts if part in found)


def stored_text_key(key: str) -> str:
    """The name of a text encoder's tensor in a file, which loaders of every version of transformers read."""
    return encoder_module(key).replace(".lora_magnitude_vector", f".{MAGNITUDE_OF_TEXT}")


def text_key(key: str, model: nn.Module) -> str:
    """The reverse, for a model whose CLIP has a `text_model` around its encoder or has lost it."""
    key = key.replace(f".{MAGNITUDE_OF_TEXT}", ".lora_magnitude_vector")
    return encoder_module(key) if hasattr(model, "text_model") else key.removeprefix("text_model.")


def settings_of(data: bytes) -> dict[str, Any]:
    """What the file says of its own configuration; empty for a file of other programs."""
    return json.loads(header_of(data).get(METADATA_KEY, "{}"))


def header_of(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def _plain(value: Any) -> Any:
    """What JSON can hold of a PEFT configuration: enumerations as their values, sets as sorted lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)

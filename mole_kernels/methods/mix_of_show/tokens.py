"""Concept tokens in a pipeline: each stands for one embedding per cross-attention layer, as extra tokens of
tokenizer and text encoder.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleFileError, MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.lowrank import LowRank
from mole_kernels.files.opening import PathLike
from mole_kernels.files.text import read_json_file
from mole_kernels.methods.mix_of_show.guard import guard_tokenizer

# token -> text encoder -> V [L,K]: one row for each cross-attention layer
Embeddings = Mapping[str, Mapping[str, Tensor]]
ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some concepts: what stands for each in layer 0, 1, … and under which ids.

    Args:
        names: Token -> its L names, <new0> … as the paper's tools call them.
        ids: Token -> text encoder -> their L ids.
        layers: L.
    """

    names: Mapping[str, tuple[str, ...]]
    ids: Mapping[str, Mapping[str, tuple[int, ...]]]
    layers: int

    def expand(self, prompt: str) -> list[str]:
        """L prompts, in the i-th of which every token is its name in layer i."""
        variants = []
        for i in range(self.layers):
            text = prompt
            for token, names in self.names.items():
                # the spaces keep two tokens apart that a prompt writes together
                text = text.replace(token, f" {names[i]} ")
            variants.append(
                " ".join(text.split()) if any(token in prompt for token in self.names) else prompt
            )
        return variants

    def only(self, wanted: Iterable[str]) -> Tokens:
        """Some of the tokens, under the names and ids that they have here."""
        chosen = set(wanted)
        return Tokens(
            {token: names for token, names in self.names.items() if token in chosen},
            {token: ids for token, ids in self.ids.items() if token in chosen},
            self.layers,
        )

    def config(self, encoder: str = "text_encoder") -> dict[str, dict[str, list[Any]]]:
        """What the paper's tools keep beside a pipeline as new_concept_cfg.json."""
        return {
            token: {"concept_token_ids": list(self.ids[token][encoder]), "concept_token_names": list(names)}
            for token, names in self.names.items()
        }


def text_encoders(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """{component: (text encoder, its tokenizer)}: one in Stable Diffusion 1 and 2, two in SDXL."""
    encoders = {}
    for component in ENCODERS:
        encoder: Any = getattr(pipe, component, None)
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
        if isinstance(encoder, nn.Module) and tokenizer is not None:
            config: Any = encoder.config
            if not hasattr(encoder, "get_input_embeddings") or config.model_type not in (
                "clip_text_model",
                "clip",
            ):
                raise MoleTypeError(
                    f"concepts: {component}", expected="a CLIP text model", got=type(encoder).__name__
                )
            encoders[component] = (encoder, tokenizer)
    if not encoders:
        raise MoleTypeError(
            "concepts", expected="a pipeline with a text encoder and a tokenizer", got=type(pipe).__name__
        )
    return encoders


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """{path: attention to the text} in the order of their embeddings: down, mid, up; 16 in Stable Diffusion
    1.5, 70 in SDXL.
    """
    layers = {
        path: module
        for path, module in unet.named_modules()
        if path.endswith(".attn2")
        and getattr(module, "is_cross_attention", False)
        and hasattr(module, "to_k")
    }
    if not layers:
        raise MoleTypeError(
            "concepts", expected="a UNet with cross-attention (attn2)", got=type(unet).__name__
        )
    # diffusers registers up_blocks before mid_block
    order = ("down_blocks", "mid_block", "up_blocks")
    return dict(sorted(layers.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def add_concepts(pipe: Any, embeddings: Embeddings) -> Tokens:
    """Adds the tokens and their embeddings to the pipeline's tokenizers and text encoders; all is checked
    before anything changes.

    From then on text that still holds a token is refused by the tokenizers (see `guard`): it has to be
    expanded, as `sample_concepts`, `encode_prompts` and `regional(…, tokens=…)` do.
    Raises MoleValueError for a token that is no new word, MoleShapeError for embeddings of another model.
    """
    parts = text_encoders(pipe)
    layers = len(cross_attentions(pipe.unet))
    _check_names(embeddings, {component: tokenizer for component, (_, tokenizer) in parts.items()})
    _check_shapes(embeddings, parts, layers)
    vocabulary = {word for _, tokenizer in parts.values() for word in tokenizer.get_vocab()}
    free = (f"<new{i}>" for i in itertools.count() if f"<new{i}>" not in vocabulary)
    names = {token: tuple(next(free) for _ in range(layers)) for token in embeddings}
    ids: dict[str, dict[str, tuple[int, ...]]] = {token: {} for token in embeddings}
    for component, (encoder, tokenizer) in parts.items():
        # a copy, since a tokenizer cannot forget
        larger = guard_tokenizer(tokenizer, embeddings)
        larger.add_tokens([name for own in names.values() for name in own])
        for token, own in names.items():
            ids[token][component] = tuple(larger.convert_tokens_to_ids(list(own)))
        _extend(encoder, {ids[token][component]: embeddings[token][component] for token in embeddings})
        setattr(pipe, component.replace("text_encoder", "tokenizer"), larger)
    return Tokens(names, ids, layers)


def read_concepts(pipe: Any, path: PathLike) -> Tokens:
    """The tokens of a pipeline that holds its concepts already, from its new_concept_cfg.json.

    For pipelines that the paper's tools or `save_dense` have written; their tokenizers refuse unexpanded
    tokens from then on, as after `add_concepts`.

    Args:
        pipe: The pipeline that was loaded from that folder.
        path: The file, or the folder that holds it.

    Returns:
        The tokens, for `sample_concepts` and `regional`.

    Raises:
        MoleFileError: No such file, or not of that form.
        MoleValueError: A name that the tokenizer has under another id, or numbers of layers that differ.
    """
    file = Path(os.fsdecode(path))
    file = file / "new_concept_cfg.json" if file.is_dir() else file
    where, config = printable(file, 300), read_json_file(file)
    fields = {"concept_token_ids": int, "concept_token_names": str}
    if not isinstance(config, dict) or not config:
        raise MoleFileError(where, expected="an object of concept tokens", got=type(config).__name__)
    for token, entry in config.items():
        for field, kind in fields.items():
            values = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(values, list) or not all(type(value) is kind for value in values):
                raise MoleFileError(
                    f"{where}, {printable(token)}", expected=f"a list {field}", got=printable(values)
                )
    layers, parts = len(cross_attentions(pipe.unet)), text_encoders(pipe)
    names = {token: tuple(entry["concept_token_names"]) for token, entry in config.items()}
    ids: dict[str, dict[str, tuple[int, ...]]] = {token: {} for token in names}
    for token, own in names.items():
        if len(own) != layers:
            raise MoleValueError(
                f"{where}, {printable(token)}",
                expected=f"{layers} names, one for each cross-attention layer",
                got=f"{len(own)}",
            )
        for component, (_, tokenizer) in parts.items():
            ids[token][component] = tuple(tokenizer.convert_tokens_to_ids(list(own)))
        if ids[token]["text_encoder"] != tuple(config[token]["concept_token_ids"]):
            raise MoleValueError(
                f"{where}, {printable(token)}",
                expected=f"ids {config[token]['concept_token_ids'][:2]} … in the tokenizer",
                got=f"{list(ids[token]['text_encoder'][:2])} …",
                hint="load the pipeline that lies beside this file",
            )
    for component, (_, tokenizer) in parts.items():
        setattr(pipe, component.replace("text_encoder", "tokenizer"), guard_tokenizer(tokenizer, names))
    return Tokens(names, ids, layers)


@contextmanager
def concept_tokens(pipe: Any, embeddings: Embeddings) -> Iterator[Tokens]:
    """`add_concepts` for the time of a block; tokenizers and text encoders are as before at its end.

    Args:
        pipe: The pipeline.
        embeddings: The concepts' token embeddings by word and text encoder.

    Returns:
        A context manager that gives the tokens.
    """
    parts = text_encoders(pipe)
    before = {
        component: (encoder.get_input_embeddings().weight, tokenizer)
        for component, (encoder, tokenizer) in parts.items()
    }
    try:
        yield add_concepts(pipe, embeddings)
    finally:
        for component, (weight, tokenizer) in before.items():
            _set_weight(parts[component][0], weight)
            setattr(pipe, component.replace("text_encoder", "tokenizer"), tokenizer)


def class_embedding(pipe: Any, component: str, word: str) -> Tensor:
    """The embedding [K] of a word that is one token; MoleValueError for another."""
    encoder, tokenizer = text_encoders(pipe)[component]
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id != tokenizer.convert_tokens_to_ids(f"{word}</w>"):
        raise MoleValueError(
            f"concepts: class word '{printable(word)}'",
            expected="a word that is one token",
            got=f"{len(ids)}",
            hint="such as man, dog, cat",
        )
    return encoder.get_input_embeddings().weight[ids[0]].detach().float().cpu()


def new_embeddings(
    pipe: Any, tokens: Mapping[str, str], generator: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """V⁺ of each token, the same in every layer at first: `<rand-0.013>` is N(0, 0.013²), any other word that
    word's own embedding.

    Args:
        tokens: Token -> `<rand-σ>` or a class word.
    """
    layers, embeddings = len(cross_attentions(pipe.unet)), dict[str, dict[str, Tensor]]()
    for token, start in tokens.items():
        embeddings[token] = {}
        for component, (encoder, _) in text_encoders(pipe).items():
            K = encoder.get_input_embeddings().weight.shape[1]
            if start.startswith("<rand-") and start.endswith(">"):
                row = torch.randn(K, generator=generator) * _spread(start)
            else:
                row = class_embedding(pipe, component, start)
            embeddings[token][component] = row.repeat(layers, 1)
    return embeddings


def random_words(pipe: Any, tokens: Sequence[str], seed: int) -> dict[str, dict[str, Tensor]]:
    """Embeddings as words might have that no template contains, the same in every layer.

    Each number is drawn from a normal distribution with the mean and spread of its column in the text
    encoder's table.
    """
    layers, generator = len(cross_attentions(pipe.unet)), torch.Generator().manual_seed(seed)
    words: dict[str, dict[str, Tensor]] = {token: {} for token in tokens}
    for component, (encoder, tokenizer) in text_encoders(pipe).items():
        table: Tensor = encoder.get_input_embeddings().weight.detach()
        # rows beyond the vocabulary are padding of the table
        known = sorted(at for at in tokenizer.get_vocab().values() if at < len(table))
        rows = table[known].float().cpu()
        mean, spread = rows.mean(0), rows.std(0) if len(rows) > 1 else torch.zeros(rows.shape[1])
        for token in tokens:
            drawn = mean + spread * torch.randn(len(mean), generator=generator)
            words[token][component] = drawn.repeat(layers, 1)
    return words


def portable(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Layers under the names that files have: transformers 5 lost the level text_model, which readers of
    today add or drop.
    """
    return {
        re.sub(r"^(text_encoder\w*)\.encoder\.", r"\1.text_model.encoder.", path): layer
        for path, layer in layers.items()
    }


def _spread(start: str) -> float:
    try:
        return float(start[6:-1])
    except ValueError:
        raise MoleValueError(
            "concepts: initialiser", expected="<rand-0.013> or a word", got=f"'{printable(start)}'"
        ) from None


def _check_names(embeddings: Embeddings, tokenizers: Mapping[str, Any]) -> None:
    if not embeddings:
        raise MoleValueError("concepts", expected="at least one token", got="none")
    for component, tokenizer in tokenizers.items():
        words = tokenizer.get_vocab()
        for token in embeddings:
            # CLIP's tokenizers know no capitals and end a word's last piece by </w>
            low = token.lower()
            if not token or any(c.isspace() for c in token) or not token.isprintable():
                raise MoleValueError(
                    "concepts",
                    expected="tokens of printable characters without spaces",
                    got=f"'{printable(token)}'",
                )
            if {token, low, f"{low}</w>"} & words.keys():
                raise MoleValueError(
                    f"concepts: token '{printable(token)}'",
                    f"is a word that the {component}'s tokenizer already has",
                    hint="take a name such as <potter1>, which no text contains by chance",
                )
    check_apart(list(embeddings))


def check_apart(tokens: Sequence[str]) -> None:
    """Raises MoleValueError where one token is another, or part of another: prompts could not be read."""
    for i, token in enumerate(tokens):
        for other in tokens[i + 1 :]:
            if token in other or other in token:
                raise MoleValueError(
                    f"concepts: token '{printable(token)}'",
                    f"collides with the token '{printable(other)}' of another concept",
                    hint="train one of them under another name, or rename it in its file",
                )


def _check_shapes(embeddings: Embeddings, parts: Mapping[str, tuple[Any, Any]], layers: int) -> None:
    for token, by_component in embeddings.items():
        for component, (encoder, _) in parts.items():
            K = encoder.get_input_embeddings().weight.shape[1]
            got = by_component[component].shape if component in by_component else None
            if got is None or tuple(got) != (layers, K):
                raise MoleShapeError(
                    f"concepts: embedding of '{printable(token)}', {component}",
                    expected=f"[{layers},{K}], a row a cross-attention layer",
                    got="none" if got is None else list(got),
                    hint="the concept was trained on another base model",
                )


def _extend(encoder: Any, rows: Mapping[tuple[int, ...], Tensor]) -> None:
    old: Tensor = encoder.get_input_embeddings().weight
    count = max(old.shape[0], 1 + max(max(ids) for ids in rows))
    weight = torch.zeros(count, old.shape[1], dtype=old.dtype, device=old.device)
    weight[: old.shape[0]] = old.detach()
    for ids, values in rows.items():
        weight[list(ids)] = values.detach().to(weight)
    _set_weight(encoder, nn.Parameter(weight, requires_grad=old.requires_grad))


def _set_weight(encoder: Any, weight: nn.Parameter) -> None:
    table = encoder.get_input_embeddings()
    table.weight, table.num_embeddings, encoder.config.vocab_size = weight, weight.shape[0], weight.shape[0]

"""What all models share: initial weights, saving and loading without pickle, checks of their input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._checks import FLOATING, check_like, is_readable
from .config import ReformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_Model = TypeVar("_Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A model that can be saved to a directory and loaded from it.

    A subclass is made of one or more configurations, keyword arguments of its constructor, which it keeps as
    attributes of the names in ``config_names``.
    """

    config_names: tuple[str, ...] = ("config",)

    def __init__(self) -> None:
        super().__init__()
        self._class = type(self)  # FSDP2 makes another one of it

    def reset_parameters(self) -> None:
        """Draws all weights anew, as the constructor does: after ``to_empty``, for a model made on the meta device.

        FSDP1 on its own asks the layers instead: biases and the weights of linear layers and token embeddings then are
        those of ``nn.Linear`` and ``nn.Embedding``, until this is called within ``FSDP.summon_full_params(model)``.
        """
        std = getattr(self, self.config_names[-1]).initializer_range
        for child in self.children():
            if isinstance(child, PretrainedModel):
                child.reset_parameters()
                continue
            for part in child.modules():
                if not isinstance(part, _INITIALIZED) and (reset := getattr(part, "reset_parameters", None)):
                    reset()
            initialize(child, std)
        self._tie_weights()

    def _tie_weights(self) -> None:
        """Makes weights the same that are to be; ``to_empty`` makes two of one."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors``; the directory is made if it does not exist.

        Both are written beside their places first and then moved, so an interrupted save leaves an older one as it was.
        Of a model whose weights are DTensors (FSDP2) all processes have to call this: each gathers one weight after the
        other, the first one of the mesh writes, and the others do not wait for it.

        Raises:
            ValueError: the weights are not those of this class and configuration, so ``from_pretrained`` could not
                load them (FSDP1: call this within ``FSDP.summon_full_params``).
            OSError: a file cannot be written.
        """
        from safetensors.torch import save_file

        configs = {name: getattr(self, name).to_dict() for name in self.config_names}
        parameters = dict(self.named_parameters())  # shared ones once
        self._check_weights(parameters)
        writes = all(_is_first(p) for p in parameters.values())
        weights = {}
        for name, p in parameters.items():
            whole = _whole(p.detach())
            if writes:
                weights[name] = whole.contiguous()
        if not writes:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model": self._class.__name__, **configs}, indent=2) + "\n"
        beside = {name: directory / f".{name}.{os.getpid()}" for name in (WEIGHTS_FILE, CONFIG_FILE)}
        try:
            save_file(weights, beside[WEIGHTS_FILE])
            beside[CONFIG_FILE].write_text(text)
            for name, path in beside.items():
                os.replace(path, directory / name)
        finally:
            for path in beside.values():
                path.unlink(missing_ok=True)

    def _check_weights(self, parameters: dict[str, nn.Parameter]) -> None:
        with torch.device("meta"):
            expected = dict(self._class(**{name: getattr(self, name) for name in self.config_names}).named_parameters())
        for name in (*expected, *parameters):
            shapes = [list(owner[name].shape) if name in owner else None for owner in (expected, parameters)]
            if shapes[0] != shapes[1] or parameters[name].is_meta:
                got = f"shape {shapes[1]}" if name in parameters else "no such weight"
                raise ValueError(
                    f"the weights must be those of a {self._class.__name__} of its configuration: {name} must have "
                    f"{f'shape {shapes[0]} and values' if name in expected else 'no place'}, got {got}"
                    f"{' on the meta device' if name in parameters and parameters[name].is_meta else ''}"
                )

    @classmethod
    def from_pretrained(
        cls: type[_Model], directory: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> _Model:
        """The model that ``save_pretrained`` wrote, in evaluation mode, with weights of the dtypes they had.

        Args:
            directory: with ``config.json`` and ``model.safetensors``. Nothing in it is executed or unpickled.
            device: of the weights.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or holds something other than a model of this class.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory, device = Path(directory), torch.device(device)
        model = cls._from_config_file(directory / CONFIG_FILE)
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {WEIGHTS_FILE} in {directory}")
        try:
            weights = load_file(path, device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} is no valid safetensors file: {error}") from error
        parameters = dict(model.named_parameters())
        missing, unexpected = sorted(set(parameters) - set(weights)), sorted(set(weights) - set(parameters))
        if missing or unexpected:
            raise ValueError(f"{path} does not fit its {CONFIG_FILE}: missing {missing}, unexpected {unexpected}")
        for name, parameter in parameters.items():
            if weights[name].dtype not in FLOATING:
                raise ValueError(f"{path}: {name} must have a dtype of {FLOATING}, got {weights[name].dtype}")
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{path}: {name} must have shape {list(parameter.shape)}, got {list(weights[name].shape)}"
                )
            parameter.data = weights.pop(name).clone()  # to torch's alignment: the file has 8 bytes
        return model.eval()

    @classmethod
    def _from_config_file(cls: type[_Model], path: Path) -> _Model:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {CONFIG_FILE} in {path.parent}")
        try:
            values = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
        found = values.get("model") if isinstance(values, dict) else None
        if found != cls.__name__:
            raise ValueError(f"{path} must be of a {cls.__name__}, got {found!r}")
        if set(values) != {"model", *cls.config_names}:
            raise ValueError(f"{path} must have the keys {['model', *cls.config_names]}, got {list(values)}")
        try:
            configs = {name: ReformerConfig.from_dict(values[name]) for name in cls.config_names}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(**configs)


def _whole(weight: Tensor) -> Tensor:
    """The whole of what may be a DTensor, in all processes."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _is_first(weight: Tensor) -> bool:
    """Whether this process is the first of those that share a weight."""
    mesh: Any = getattr(weight, "device_mesh", None)  # of a DTensor
    return mesh is None or not any(mesh.get_coordinate())


_Module = TypeVar("_Module", bound=nn.Module)
_INITIALIZED = (nn.Linear, nn.Embedding)


def initialize(module: _Module, std: float) -> _Module:
    """Normal weights and zero biases in the linear layers and embeddings (as BERT and Hugging Face's Reformer)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    return module


def token_at(end: str, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, E]: of x [B, L, E] the "first" or the "last" token of each row that is no padding."""
    if attention_mask is None:
        return x[:, 0 if end == "first" else -1]
    attended, index = attention_mask != 0, torch.arange(x.shape[1], device=x.device)
    found = attended.to(torch.int8).argmax(dim=1) if end == "first" else (index * attended).amax(dim=1)
    return x[torch.arange(len(x), device=x.device), found]


def padding_mask(attention_mask: Any, tokens: Tensor, name: str = "attention_mask") -> Tensor | None:
    """The modules' ``key_padding_mask`` (bool, True: ignored) of a model's ``attention_mask`` (1: attend)."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(f"{name} must have shape {list(tokens.shape[:2])}, got {list(attention_mask.shape)}")
    check_like(name, attention_mask, "the tokens", tokens)
    return attention_mask == 0


def check_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Token ids, integers [B, L]; their values are left to the embedding, whose errors cost no synchronisation."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must have dtype torch.int64 or torch.int32, got {ids.dtype}")
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"{name} must have shape [B, L] with L at least 1, got {list(ids.shape)}")
    if is_readable(ids):
        least, most = (int(x) for x in ids.aminmax())
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{name} must be between 0 and {vocab_size - 1}, got {least if least < 0 else most}")

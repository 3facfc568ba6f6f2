"""A bundle: a directory with a model that describes itself.

::

    bundle.json      what it is: configuration, tokens, number format, frame shifts, compression steps
                     with their options, reports and states
    weights.pt       a state dict of plain tensors
    tokens.txt       token and id per line
    spm.model        the SentencePiece model, or bpe.json, a byte-level BPE
    provenance.json  when, where, by what and how fast it was made; no part of what it is
    *.py             the plugin files of its recipe, listed in bundle.json with their hashes

Decoding, exporting, compressing and teaching need nothing else. The plugins that built the
model must be loadable; the error says which one is not. Opening a bundle runs no code from it: its
plugin files are loaded only for those who say that they trust them.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import subprocess
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe import __version__
from kdrecipe.artifacts import PROVENANCE, read_json, sha256_file, write_atomic, write_json
from kdrecipe.errors import KdrecipeError, PluginError
from kdrecipe.interfaces import ModelInfo, Options
from kdrecipe.plugin.carried import FORMAT, read_description, refusal, verified
from kdrecipe.plugin.source_code import core_hash
from kdrecipe.recipe.description import check_description

if TYPE_CHECKING:
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.model.asr import AsrModel
    from kdrecipe.plugin.registry import Registry

TOKEN_MODELS = ("spm.model", "bpe.json")
"""A bundle has the one or the other, see :mod:`kdrecipe.data.tokens`."""

DATA_FILES = ("bundle.json", "weights.pt", "tokens.txt", *TOKEN_MODELS)
"""The files of every bundle; its plugin files are beside them."""

_NUMBER_FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


class Bundle:
    """A bundle on disk; the model is built when first asked for.

    Args:
        path: its directory.
        meta: content of ``bundle.json``.
        registry: where architectures, heads and compressors are looked up; None: all that is
            installed.
        trust_plugins: without a registry, load the bundle's own plugin files, too.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        registry: Registry | None = None,
        *,
        trust_plugins: bool = False,
    ) -> None:
        self.path = path
        self.meta = meta
        self._registry = registry
        self._trust_plugins = trust_plugins

    @classmethod
    def load(
        cls, path: Path | str, registry: Registry | None = None, *, trust_plugins: bool = False
    ) -> Bundle:
        """Open a bundle; nothing in it is run.

        Raises:
            KdrecipeError: not a bundle, of another format, or its description is damaged or names plugin
                files that are not its own.
        """
        path = Path(path)
        meta = read_description(path)
        check_description(meta, path / "bundle.json")
        return cls(path, meta, registry, trust_plugins=trust_plugins)

    @classmethod
    def save(
        cls,
        path: Path,
        model: AsrModel,
        tokens: Tokenizer,
        meta: dict[str, Any],
        provenance: dict[str, Any] | None = None,
    ) -> Bundle:
        """Write a bundle.

        Args:
            path: its directory.
            model: its model.
            tokens: its tokens.
            meta: what :class:`Bundle` documents, without the derived fields. Equal models made on two
                days must have equal ones, or all that is made from them is made again.
            provenance: of :func:`provenance`, and whatever else varies from run to run.
        """
        import torch

        from kdrecipe.model.asr import model_info

        path.mkdir(parents=True, exist_ok=True)
        tokens.save(path)
        # Through memory: torch's own writer reports a full disk as an internal error of its archive.
        buffer = io.BytesIO()
        torch.save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, buffer)
        write_atomic(path / "weights.pt", buffer.getvalue())
        info = model_info(model, tokens.vocab_id)
        full = {
            "format": FORMAT,
            "plugin_files": {},
            **meta,
            "vocab_id": tokens.vocab_id,
            "params": count_params(model),
            "number_format": number_format(model),
            "frame_shift_s": info.frame_shift_s,
            "frame_shifts_s": {"heads": dict(info.head_shifts_s), "taps": dict(info.tap_shifts_s)},
            "weights_sha256": sha256_file(path / "weights.pt"),
        }
        write_json(path / "bundle.json", full)
        if provenance is not None:
            write_json(path / PROVENANCE, provenance)
        return cls(path, full)

    @property
    def name(self) -> str:
        """The system's name."""
        return str(self.meta["name"])

    @property
    def provenance(self) -> dict[str, Any]:
        """What ``provenance.json`` holds; empty where there is none."""
        path = self.path / PROVENANCE
        return dict(read_json(path)) if path.exists() else {}

    @property
    def number_formats(self) -> frozenset[str]:
        """What the layers say they are stored in, or the type of all weights."""
        return frozenset(str(self.meta["number_format"]).split("+"))

    @property
    def plugin_files(self) -> dict[Path, str]:
        """Its plugin files and their hashes; PluginError for one that was changed or is missing."""
        return verified(self.path, self.meta["plugin_files"])

    @property
    def files(self) -> list[Path]:
        """All files that belong to it, and no others in the directory."""
        names = [name for name in DATA_FILES if name not in TOKEN_MODELS]
        found = [name for name in (*TOKEN_MODELS, PROVENANCE) if (self.path / name).exists()]
        return [*(self.path / name for name in (*names, *found)), *self.plugin_files]

    def head_shift_s(self, head: str) -> float:
        """Seconds from one frame of a head's output to the next."""
        return float(self.meta["frame_shifts_s"]["heads"][head])

    @property
    def hash(self) -> str:
        """Identifies weights and tokens: the key of whatever is derived from this bundle."""
        return f"{self.meta['weights_sha256']}-{self.meta['vocab_id']}"

    @cached_property
    def registry(self) -> Registry:
        """The plugins that this bundle's model is built from.

        Raises:
            PluginError: it contains plugin files, and nothing allows them to run.
        """
        if self._registry is None:
            from kdrecipe.plugin.loader import load_plugins

            files = self.plugin_files
            if files and not self._trust_plugins:
                raise PluginError(refusal(self.path, [path.name for path in files]))
            self._registry = load_plugins(list(files)).registry
        return self._registry

    @cached_property
    def tokens(self) -> Tokenizer:
        """Its tokens."""
        from kdrecipe.data.tokens import Tokenizer

        return Tokenizer.load(self.path)

    @cached_property
    def model(self) -> AsrModel:
        """Its model, on the CPU, in evaluation mode.

        Raises:
            KdrecipeError: the weights are damaged or do not fit the configuration.
        """
        import torch

        from kdrecipe.model.asr import build_model
        from kdrecipe.plugin.loader import reason
        from kdrecipe.recipe.fit import few_tensors

        tokens, registry = self.tokens, self.registry
        try:
            with few_tensors():
                model = build_model(
                    self.meta["model"],
                    input_dim=self.meta["features"]["num_mel_bins"],
                    vocab_size=len(tokens),
                    registry=registry,
                )
                for step in self.meta.get("compression", []):
                    model = build_compressor(registry, step).rebuild(model)
        except (RuntimeError, TypeError, ValueError) as error:  # of sizes that do not fit, or too large
            raise KdrecipeError(
                f"the model that it describes can't be built: {reason(error)}",
                where=str(self.path / "bundle.json"),
                remedy="take the bundle as it was written, with the plugins that it was made with",
            ) from error
        weights = self.path / "weights.pt"
        # Looked at first: torch loads a file without a murmur in which only numbers are damaged.
        if not weights.is_file() or sha256_file(weights) != self.meta["weights_sha256"]:
            raise KdrecipeError(
                "the weights are damaged (their hash differs from bundle.json)"
                if weights.is_file()
                else "the weights are missing",
                where=str(weights),
                remedy="rerun the stage that wrote this bundle with --force",
            )
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # torch raises a different type for everything that does not fit
            raise KdrecipeError(f"the weights do not fit the model: {error}", where=str(weights)) from error
        return model.eval()

    @cached_property
    def info(self) -> ModelInfo:
        """What losses may know of this model."""
        from kdrecipe.model.asr import model_info

        return model_info(self.model, self.meta["vocab_id"])


def build_compressor(registry: Registry, step: dict[str, Any]) -> Any:
    """The compressor that ``{name, options}`` names, with the ``state`` that a bundle keeps of it, if any."""
    cls = registry.get("compressors", step["name"])
    config: Options = cls.Config.model_validate(step.get("options", {}))
    compressor = cls(config)
    if step.get("state"):
        compressor.load_state(step["state"])
    return compressor


def compressor_state(name: str, compressor: Any) -> dict[str, Any]:
    """What a bundle keeps of a compressor that has been applied, as it comes back from JSON.

    Raises:
        PluginError: it is not JSON-like.
    """
    state = compressor.state() if hasattr(compressor, "state") else {}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"compressor {name!r}: its state can't be written as JSON ({error})",
            remedy="state() gives a dict of strings, numbers and lists; tensors belong to the weights",
        ) from error
    return plain


def number_format(model: AsrModel) -> str:
    """What the weights are stored in: what layers declare (``number_format``: ``int4+int8`` of two kinds),
    ``int8`` if some matrices are without a word, otherwise ``fp32``, ``fp16`` or ``bf16``."""
    import torch

    declared = {str(m.number_format) for m in model.modules() if hasattr(m, "number_format")}
    if declared:
        return "+".join(sorted(declared))
    matrices = [x.dtype for x in (*model.parameters(), *model.buffers()) if x.dim() > 1]
    if {torch.int8, torch.uint8} & set(matrices):
        return "int8"
    first = str(matrices[0]).removeprefix("torch.") if matrices else ""
    return _NUMBER_FORMATS.get(first, "fp32")


def count_params(model: AsrModel) -> int:
    """Number of weights, whatever their type: parameters, and the int8 weights kept as buffers."""
    import torch

    count = sum(p.numel() for p in model.parameters())
    return count + sum(b.numel() for b in model.buffers() if b.dtype in (torch.int8, torch.uint8))


def provenance(command: str, **more: Any) -> dict[str, Any]:
    """Versions and machine, for ``provenance.json`` and the report; no host name, no local path."""
    import importlib.metadata as md

    names = ("torch", "torchaudio", "lhotse", "sentencepiece", "onnxruntime", "sherpa-onnx")
    versions = {"kdrecipe": __version__, "python": platform.python_version()}
    for name in names:
        try:
            versions[name] = md.version(name)
        except md.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "command": command,
        "core": core_hash(),
        "date": datetime.date.today().isoformat(),
        "git": git_commit(),
        "machine": machine(),
        "versions": versions,
        **more,
    }


def machine() -> dict[str, Any]:
    """The machine in words, nothing that names it."""
    cpu = platform.processor() or platform.machine()
    gpu = _gpu()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), **({"gpu": gpu} if gpu else {})}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def git_commit() -> str | None:
    """Commit of the source tree that this code runs from, ``+`` if it has changes; None if unknown."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    # Only code counts: results written into a recipe must not change the name of what made them.
    code = ["--", "*.py", "*.yaml", "*.cfg", "*.toml"]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        if head.returncode:
            return None
        status = [*git, "status", "--porcelain", "--untracked-files=no", *code]
        changed = subprocess.run(status, capture_output=True, text=True, timeout=30).stdout.strip()
        return head.stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.TimeoutExpired):
        return None

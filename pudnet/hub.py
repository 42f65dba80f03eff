"""Sharing by the conventions of the Hugging Face Hub: ``save_pretrained``, ``push_to_hub``, and a generated card.

The work is done by ``ModelHubMixin`` of huggingface_hub, which is imported when it is needed. Reading is
``from_pretrained`` of each class, with ``pudnet.checkpoint.find``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pudnet import checkpoint
from pudnet._version import __version__
from pudnet.errors import InputError, message
from pudnet.files import atomic_path, open_tensors

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

{{ usage }}

{{ details }}
"""


class Shared:
    """What can be shared on the Hub. A subclass has ``save``, and says what the card tells.

    Attributes:
        hub_file: name of the one file with weights.
    """

    hub_file: ClassVar[str] = checkpoint.HUB_FILE

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file."""
        raise NotImplementedError

    def card_parts(self, name: str) -> dict[str, Any]:
        """``title``, ``summary``, ``usage``, ``details`` and ``tags`` of the card; ``name`` is what to load by."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        private: bool | None = None,
        token: str | None = None,
    ) -> str | None:
        """Write a folder that ``from_pretrained`` reads: the weights, ``config.json`` and a card, ``README.md``.

        A card that is there already is kept.

        Args:
            repo_id, private, token: of the repository, with ``push_to_hub``; its name is that of the folder by default.
            push_to_hub: upload the folder as well.

        Returns:
            The address of the commit, with ``push_to_hub``.

        Raises:
            InputError: huggingface_hub is not installed, or the folder cannot be written.
        """
        options = {"private": private, "token": token} if push_to_hub else {}
        try:
            address: str | None = self._on_the_hub(repo_id or Path(folder).name).save_pretrained(
                Path(folder), repo_id=repo_id, push_to_hub=push_to_hub, **options
            )
        except OSError as error:
            if push_to_hub and not isinstance(error, (FileExistsError, PermissionError)):
                raise  # of the network
            got = f"{os.fspath(folder)!r} ({error})"
            raise InputError(message("save_pretrained", "folder", "one that can be written", got)) from error
        return address

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload from pudnet",
        create_pr: bool | None = None,
    ) -> str:
        """Upload to the repository ``repo_id`` (``owner/name``), which is made if there is none.

        Returns:
            The address of the commit.

        Raises:
            InputError: huggingface_hub is not installed. The errors of the network are huggingface_hub's.
        """
        options = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        return str(self._on_the_hub(repo_id).push_to_hub(repo_id, commit_message=commit_message, **options))

    def _on_the_hub(self, name: str) -> Any:
        """This object as huggingface_hub's mixin knows one."""
        try:
            from huggingface_hub import ModelCard, ModelHubMixin
        except ImportError as error:
            hint = "Type: pip install huggingface_hub"
            raise InputError(message("save_pretrained", "huggingface_hub", "installed", error, hint)) from error
        shared = self

        class OnTheHub(
            ModelHubMixin,
            library_name="pudnet",
            pipeline_tag="image-classification",
            tags=[*self.card_parts(name)["tags"]],
            model_card_template=TEMPLATE,
        ):
            def _save_pretrained(self, save_directory: Path) -> None:
                path = save_directory / shared.hub_file
                shared.save(path)
                with (
                    open_tensors(path, checkpoint.HEADER_KEY, "save_pretrained") as (header, _),
                    atomic_path(save_directory / "config.json", "save_pretrained") as temporary,
                ):
                    temporary.write_text(json.dumps(header, indent=2), encoding="utf-8")

            def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
                parts = {key: value for key, value in shared.card_parts(name).items() if key != "tags"}
                return super().generate_model_card(*args, **{**parts, **kwargs})

        return OnTheHub()


def model_card(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Card of a predicted model; ``config`` is the one in its file."""
    report, classes = config["report"], config["classes"]
    made = {key: value for key, value in report.get("provenance", {}).items() if key not in ("sketch", "class_counts")}
    accuracy = report.get("expected_accuracy")
    rows = {
        "classes": f"{len(classes)}: {', '.join(classes)}",
        "input": f"RGB, {config['preprocess']['size']} x {config['preprocess']['size']} after resizing",
        "accuracy to expect on images of the same kind": "unknown" if accuracy is None else f"{100 * accuracy:.1f} %",
        "images it was made from": report.get("n"),
        "warnings": report.get("warnings", []),
        "head": report.get("head", {}).get("name"),
        "BatchNorm": config["batchnorm"],
        "network": config["target"] or "a module of the author's",
    }
    if rows["head"] == "kernel":
        rows["of its training images"] = "the file holds a vector of features of each (the head `ridge` keeps none)"
    return {
        "title": name.rpartition("/")[2],
        "summary": "An image classifier. Its convolution weights were predicted from a sample of its training images "
        "in one forward pass of a hypernetwork ([arXiv 2310.11862](https://arxiv.org/abs/2310.11862)); its last layer "
        "was fitted in closed form. The accuracy to expect is a leave-one-out estimate, not measured on test images.",
        "usage": _python(
            f"import pudnet\n\nmodel = pudnet.PredictedModel.from_pretrained({json.dumps(name)})\n"
            "labels, probabilities = model.classify(images)  # uint8 [n, H, W, C], any size"
        ),
        "details": f"{_table(rows)}\n\n## How it was made\n\n{_table(made)}",
        "tags": ["pudnet", "weight-prediction"],
    }


def hypernetwork_card(
    name: str, kind: str, usage: str, config: Mapping[str, Any], card: Mapping[str, Any]
) -> dict[str, Any]:
    """Card of a hypernetwork: ``kind`` in words, its ``config``, and the ``card`` that training wrote."""
    made = f"\n\n## How it was made\n\n{_table(card)}" if card else ""
    return {
        "title": name.rpartition("/")[2],
        "summary": f"{kind} It predicts weights in one forward pass instead of training them.",
        "usage": _python(f"import pudnet\n\n{usage.format(name=json.dumps(name))}"),
        "details": _table(config) + made,
        "tags": ["pudnet", "hypernetwork", "weight-prediction"],
    }


def _table(rows: Mapping[str, Any]) -> str:
    """Two columns of Markdown."""
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: object, most: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return text if len(text) <= most else f"{text[:most]}..."


def _python(code: str) -> str:
    """A block of Python in Markdown."""
    return f"```python\n{code}\n```\n\nWritten by pudnet {__version__}; the file holds no pickled objects."

"""What the README tells a newcomer to paste, run as it stands against the local Hub."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification

from hf_layerfusion import RECIPES
from hf_layerfusion.cli.main import build_parser
from hf_layerfusion.training import run as training_run

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def beans(rows):
    """Leaves in three colours, with the columns of the dataset that the README names."""
    generator = np.random.default_rng(rows)
    labels = [row % 3 for row in range(rows)]
    noise = generator.integers(0, 60, (rows, 20, 20, 3))
    pictures = [
        PILImage.fromarray(np.uint8(noise[row] + 190 * np.eye(3, dtype=int)[labels[row]])) for row in range(rows)
    ]
    features = Features({"image": Image(), "labels": ClassLabel(names=["angular_leaf_spot", "bean_rust", "healthy"])})
    return Dataset.from_dict({"image": pictures, "labels": labels}, features=features)


@pytest.mark.slow
def test_python_blocks_run_as_they_stand(hub, save_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "namespaces", {*hub.namespaces, "facebook", "AI-Lab-Makerere", "user"})
    hub.upload_folder(save_backbone(tmp_path / "backbone"), "facebook/dinov2-small")
    DatasetDict({"train": beans(48), "test": beans(24)}).push_to_hub("AI-Lab-Makerere/beans")
    monkeypatch.chdir(tmp_path)
    beans(3)[2]["image"].save("picture.png")
    names: dict = {}
    train, load, choose, share = blocks("python")
    exec(train, names)
    assert names["trainer"].state.global_step == 40
    assert "eval_balanced_accuracy" in capsys.readouterr().out
    exec(load, names)
    assert names["classify"]("picture.png", top_k=1)[0]["label"] == "healthy"
    # Of so few rows, the protocol's thousand steps are minutes for the grid.
    monkeypatch.setattr(training_run, "MIN_EPOCHS", 2)
    monkeypatch.setattr(training_run, "MIN_STEPS", 2)
    exec(choose, names)
    assert f"best of {63 + 21} settings" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained("best-head")
    assert model.config.recipe == names["found"].best.recipe
    model.push_to_hub("user/birds")
    names["pixel_values"] = torch.zeros(2, 3, 16, 16)
    exec(share, names)
    assert {name: output.logits.shape for name, output in names["outputs"].items()} == {
        "user/flowers": (2, 3),
        "user/birds": (2, 3),
    }


def test_commands_parse():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("layerfusion ")]
    assert len(commands) == 13
    for command in commands:
        assert callable(build_parser().parse_args(shlex.split(command)[1:]).run)


def test_recipe_table_is_complete():
    table = README.split("## Recipes")[1].split("\n## ")[0]
    named = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1])
    }
    assert named == set(RECIPES)

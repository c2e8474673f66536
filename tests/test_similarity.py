"""Similarity between all tokens of a bank, against direct computations."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from sweep_helpers import CLASSES, WIDTH, write_features

from hf_layerfusion import LayerFusionError
from hf_layerfusion.analysis import linear_cka, rbf_cka, rsa

# Blocks are 16 wide, activations 64, so blocks are padded.
BANK = [[1, "block", "mean"], [2, "block", "mean"], [2, "activation", "mean"], [6, "final_norm", "cls"]]
WIDTHS = [WIDTH, WIDTH, 4 * WIDTH, WIDTH]
ROWS = 50


def tokens_like(rows, seed=0):
    """`(rows, N, 64)`: the second token is a noisy rotation of the first, the third a nonlinear map of it."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, len(BANK), 4 * WIDTH))
    first = rng.normal(size=(rows, WIDTH)) * np.geomspace(3, 0.1, WIDTH) + 1
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    tokens[:, 0, :WIDTH] = first
    tokens[:, 1, :WIDTH] = first @ rotation + 0.3 * rng.normal(size=(rows, WIDTH))
    tokens[:, 2] = np.maximum(first @ rng.normal(size=(WIDTH, 4 * WIDTH)), 0)
    tokens[:, 3, :WIDTH] = rng.normal(size=(rows, WIDTH))
    return torch.from_numpy(tokens).float()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Sorted by class, as many data sets are."""
    labels = np.arange(ROWS) * CLASSES // ROWS
    return write_features(tmp_path_factory.mktemp("features") / "train", labels, tokens_like(ROWS), bank=BANK)


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def linear_kernel(values):
    return values @ values.T


def rbf_kernel(values, sigma=0.2):
    return np.exp(-((values[:, None] - values[None]) ** 2).sum(-1) / (2 * sigma**2))


def hsic_song(kernel, other):
    """Nguyen et al. 2021, eq. 3, as written there."""
    n = len(kernel)
    kernel, other, ones = kernel - np.diag(np.diag(kernel)), other - np.diag(np.diag(other)), np.ones(n)
    value = np.trace(kernel @ other)
    value += (ones @ kernel @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (ones @ kernel @ other @ ones)) / (n * (n - 3))


def hsic_by_definition(kernel, other):
    """The U-statistic over all quadruples of different images (Song et al. 2012)."""
    total = count = 0
    for i, j, q, r in itertools.permutations(range(len(kernel)), 4):
        total += kernel[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        count += 1
    return total / count


def direct_cka(tokens, kernel, hsic=hsic_song, normalize=True):
    values = [token.astype(np.float64) for token in np.moveaxis(tokens.numpy(), 1, 0)]
    kernels = [kernel(unit(value) if normalize else value) for value in values]
    scale = [hsic(kernel, kernel) for kernel in kernels]
    pairs = itertools.product(range(len(kernels)), repeat=2)
    matrix = [hsic(kernels[a], kernels[b]) / np.sqrt(scale[a] * scale[b]) for a, b in pairs]
    return np.reshape(matrix, (len(kernels), -1))


@pytest.mark.parametrize(
    ("measure", "kernel", "options"),
    [
        (linear_cka, linear_kernel, {}),
        (linear_cka, linear_kernel, {"normalize": False}),
        (rbf_cka, rbf_kernel, {}),
        (rbf_cka, lambda values: rbf_kernel(values, 3.0), {"sigma": 3.0, "normalize": False}),
    ],
)
def test_cka_of_one_batch_is_the_direct_computation(features, measure, kernel, options):
    found = measure(features, **options)
    expected = direct_cka(tokens_like(ROWS), kernel, normalize=options.get("normalize", True))
    np.testing.assert_allclose(found.matrix, expected, atol=1e-9)
    assert found.matrix.dtype == np.float64
    assert found.token_names == features.token_names
    assert found.num_images == ROWS


def test_the_estimator_is_the_unbiased_one(tmp_path):
    tokens = tokens_like(7)
    features = write_features(tmp_path / "train", np.arange(7) % CLASSES, tokens, bank=BANK)
    expected = direct_cka(tokens, linear_kernel, hsic_by_definition)
    np.testing.assert_allclose(linear_cka(features).matrix, expected, atol=1e-9)


def test_what_cka_says(features):
    matrix = linear_cka(features).matrix
    assert matrix[0, 1] > 0.9  # a rotation
    assert abs(matrix[0, 3]) < 0.15  # chance, which the biased estimator puts at 0.3 here
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diagonal(matrix), 1)


def test_a_batch_that_holds_all_images_is_exact(features):
    exact = linear_cka(features).matrix
    np.testing.assert_array_equal(linear_cka(features, batch_size=ROWS, num_passes=3).matrix, exact)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real images as tokens: pixels, and random ReLU features of them, through which similarity falls."""
    data = load_digits()
    rng = np.random.default_rng(0)
    tokens = [data.data]
    for _ in range(3):
        hidden = tokens[-1] @ rng.normal(size=(64, 64))
        tokens.append(np.maximum(hidden - hidden.mean(0), 0))
    tokens = torch.from_numpy(np.stack(tokens, axis=1)[np.argsort(data.target, kind="stable")][:900]).float()
    bank = [[layer, "activation", "mean"] for layer in (1, 2, 3, 4)]
    labels, names = np.sort(data.target)[:900], [str(digit) for digit in range(10)]
    return write_features(tmp_path_factory.mktemp("digits") / "train", labels, tokens, bank=bank, label_names=names)


# A Gaussian of width 0.2 sees near neighbours only, of which small batches have few.
@pytest.mark.parametrize(("measure", "most"), [(linear_cka, 0.05), (rbf_cka, 0.1)])
def test_batches_converge_to_all_images(digits, measure, most):
    exact = measure(digits).matrix
    # Batches of 64 of 900 are 14 or 15: each pass is one draw, and errors fall with the root of their number.
    once, often = (
        np.abs(measure(digits, batch_size=64, num_passes=passes).matrix - exact).max() for passes in (1, 40)
    )
    assert once < most
    assert often < 0.3 * once
    assert np.abs(measure(digits, batch_size=450).matrix - exact).max() < 0.01
    assert 0.1 < exact[0, 3] < exact[0, 1] < 0.99


def test_batches_are_random_but_repeatable(digits):
    first, again, other = (linear_cka(digits, batch_size=100, seed=seed).matrix for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-5


@pytest.mark.parametrize("rows", [ROWS - 3, ROWS])  # with a smaller last batch, if the rows were cut in order
def test_every_image_is_in_one_batch(features, rows, monkeypatch):
    seen = []
    chosen = features.select_rows(range(rows))
    read = type(chosen).batch
    monkeypatch.setattr(type(chosen), "batch", lambda self, index: seen.append(index) or read(self, index))
    linear_cka(chosen, batch_size=12)
    assert sorted(np.concatenate(seen)) == list(range(rows))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert len(seen) == -(-rows // 12)


@pytest.mark.parametrize(("correlation", "correlate"), [("pearson", pearsonr), ("spearman", spearmanr)])
def test_rsa_is_the_direct_computation(features, correlation, correlate):
    tokens = tokens_like(ROWS).numpy().astype(np.float64)
    upper = np.triu_indices(ROWS, k=1)
    pairs = [1 - np.corrcoef(tokens[:, n, :width])[upper] for n, width in enumerate(WIDTHS)]
    expected = [[correlate(a, b).statistic for b in pairs] for a in pairs]
    found = rsa(features, correlation=correlation)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-6)
    assert found.measure == f"rsa_{correlation}"


def test_rsa_of_some_images(features):
    some = rsa(features, max_images=20, seed=3)
    assert some.num_images == 20
    np.testing.assert_array_equal(some.matrix, rsa(features, max_images=20, seed=3).matrix)
    assert not np.allclose(some.matrix, rsa(features, max_images=20, seed=4).matrix)


@pytest.mark.parametrize("measure", [linear_cka, rbf_cka, rsa])
def test_a_constant_token_has_no_similarity(tmp_path, measure):
    tokens = tokens_like(ROWS)
    tokens[:, 1] = tokens[0, 1]
    matrix = measure(write_features(tmp_path / "train", np.arange(ROWS) % 3, tokens, bank=BANK)).matrix
    assert np.isnan(matrix[1]).all()
    assert np.isnan(matrix[:, 1]).all()
    assert np.isfinite(np.delete(np.delete(matrix, 1, 0), 1, 1)).all()


def test_json(features, tmp_path):
    similarity = linear_cka(features)
    similarity.matrix[0, 3] = np.nan
    similarity.save_json(tmp_path / "similarity.json")
    text = (tmp_path / "similarity.json").read_text(encoding="utf-8")
    assert "layer 2 · activation · mean" in text
    values = json.loads(text)
    assert values["num_images"] == ROWS
    assert values["token_names"] == features.token_names
    assert values["linear_cka"][0][3] is None
    assert values["linear_cka"][1] == similarity.matrix[1].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: linear_cka(f.select_rows(range(3))), "at least 4 images, here are 3"),
        (lambda f: linear_cka(f, batch_size=7), "batch_size=7 is too small for CKA: use 8 or more"),
        (lambda f: rbf_cka(f, num_passes=0), "num_passes=0"),
        (lambda f: rbf_cka(f, sigma=0.0), "sigma=0.0"),
        (lambda f: rsa(f, correlation="kendall"), "correlation='kendall' is unknown"),
        (lambda f: rsa(f.select_rows([0, 1])), "at least 3 images, here are 2"),
    ],
)
def test_what_cannot_be_measured(features, call, message):
    with pytest.raises(LayerFusionError, match=message):
        call(features)

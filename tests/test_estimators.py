"""Recipes that scikit-learn fits, against scikit-learn itself and against the same by hand."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sweep_helpers import BANK, CLASSES, LAYERS, WIDTH, class_labels, learnable_tokens, write_features

from hf_layerfusion import LayerFusionError
from hf_layerfusion.estimators import ESTIMATORS, fit_estimator
from hf_layerfusion.sweeps.selection import split_rows

# What each recipe reads in this library's tables.
LAST_CLS = {"modules": ["final_norm"], "pools": ["cls"]}
MIDDLE_MEAN = {"layers": [3], "modules": ["block"], "pools": ["mean"]}
TOKENS = {"knn": LAST_CLS, "logistic": MIDDLE_MEAN, "pca": {"modules": ["block"]}}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Training and test features of the same classes, unbalanced in training."""
    folder = tmp_path_factory.mktemp("features")
    labels = np.concatenate([class_labels(60), np.zeros(40, dtype=np.int64)])
    tokens = learnable_tokens(np.concatenate([labels, class_labels(90)]), noise=1.5)
    train = write_features(folder / "train", labels, tokens[:100])
    return train, write_features(folder / "test", class_labels(90), tokens[100:])


def unit_tokens(features, tokens):
    """`(rows, N * D)`, each token divided by its norm, in numpy."""
    values = features.select(**tokens).tensors()["layer_features"].numpy().astype(np.float32)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).reshape(len(values), -1)


def test_logistic_is_the_pipeline_of_the_paper(caches):
    """`run_linear_probing` of the code of arXiv 2603.05280, called by hand."""
    train, test = caches
    found = fit_estimator("logistic", train.select(**MIDDLE_MEAN), seed=5)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, random_state=42))
    pipeline.fit(unit_tokens(train, MIDDLE_MEAN), train.labels)
    x = unit_tokens(test, MIDDLE_MEAN)
    predictions = found.predict(test)
    assert predictions.dtype == np.int64
    np.testing.assert_array_equal(predictions, pipeline.predict(x))
    assert 0.5 < found.score(test)["accuracy"] == pipeline.score(x, test.labels) < 1
    assert (found.setting, found.validation_score) == ({"C": 1.0}, None)
    assert found.num_parameters == CLASSES * (WIDTH + 1)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_neighbours_vote_by_similarity(caches, k):
    train, test = caches
    found = fit_estimator("knn", train.select(**LAST_CLS), values=[k])
    similarity = unit_tokens(test, LAST_CLS).astype(np.float64) @ unit_tokens(train, LAST_CLS).astype(np.float64).T
    votes = np.zeros((len(test), CLASSES))
    for row, similarities in enumerate(similarity):
        for neighbour in np.argsort(-similarities)[:k]:
            votes[row, train.labels[neighbour]] += np.exp(similarities[neighbour] / 0.07)
    np.testing.assert_array_equal(found.predict(test), votes.argmax(axis=1))
    assert found.setting == {"k": k, "temperature": 0.07}
    assert found.num_parameters == 0


def test_neighbours_of_several_tokens_have_the_mean_of_their_similarities(caches):
    train, test = caches
    found = fit_estimator("knn", train.select(modules=["block"]), values=[1])
    tokens = {"modules": ["block"]}
    x, y = (unit_tokens(part, tokens).reshape(len(part), -1, WIDTH) for part in (test, train))
    nearest = np.einsum("tnd,snd->ts", x, y).argmax(axis=1)
    np.testing.assert_array_equal(found.predict(test), train.labels[nearest])


@pytest.mark.parametrize("rows", [100, 30], ids=["more rows than columns", "fewer"])
def test_components_come_from_the_training_rows(caches, rows):
    train, test = caches
    train = train.select_rows(np.arange(rows))
    tokens = {"layers": [1, 2], "modules": ["block"]}  # 4 tokens: 64 columns
    found = fit_estimator("pca", train.select(**tokens), values=[0.1])
    scaler = StandardScaler().fit(unit_tokens(train, tokens))
    x = scaler.transform(unit_tokens(train, tokens))
    variances = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    components = int((np.cumsum(variances) / variances.sum() <= 0.99).sum()) + 1
    assert found.setting == {"C": 0.1, "components": components, "variance": 0.99}
    assert 10 < components < min(rows, 4 * WIDTH)
    assert found.num_parameters == CLASSES * (components + 1)
    pca = PCA(components).fit(x)
    counts = np.bincount(train.labels)
    weights = dict(enumerate(len(train) / (CLASSES * counts)))  # the reference's
    classifier = LogisticRegression(C=0.1, class_weight=weights, max_iter=5000).fit(pca.transform(x), train.labels)
    expected = classifier.predict(pca.transform(scaler.transform(unit_tokens(test, tokens))))
    np.testing.assert_array_equal(found.predict(test), expected)


@pytest.mark.parametrize("options", [{}, {"num_folds": 3}, {"groups": np.arange(100) // 5, "split_seed": 4}])
@pytest.mark.parametrize("name", ["knn", "pca"])
def test_value_is_chosen_on_validation_rows(caches, name, options):
    train, _ = caches
    features = train.select(**LAST_CLS)
    values = [1, 5, 20] if name == "knn" else [1e-3, 100.0]
    found = fit_estimator(name, features, values=values, **options)
    split = {"validation_size": 0.2, "num_folds": None, "seed": options.get("split_seed", 0), **options}
    split.pop("split_seed", None)
    expected = {}
    for value in values:
        scores = []
        for fitted, judged in split_rows(features, **split):
            one = fit_estimator(name, features.select_rows(fitted), values=[value])
            scores.append(one.score(features.select_rows(judged))["balanced_accuracy"])
        expected[value] = np.mean(scores)
    assert found.validation_scores == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    chosen = found.setting["k" if name == "knn" else "C"]
    assert found.validation_score == max(expected.values()) == expected[chosen]


@pytest.mark.parametrize(("name", "values", "chosen"), [("knn", [3, 5, 1], 5), ("pca", [1.0, 0.1, 10.0], 0.1)])
def test_of_equal_values_the_more_regularised_is_taken(tmp_path, name, values, chosen):
    features = write_features(tmp_path, tokens=learnable_tokens(class_labels(), noise=0.01))
    found = fit_estimator(name, features, values=values)
    assert set(found.validation_scores.values()) == {1.0}
    assert found.setting["k" if name == "knn" else "C"] == chosen


def test_scores_are_those_of_scikit_learn(caches):
    train, test = caches
    found = fit_estimator("logistic", train.select(**LAST_CLS))
    unbalanced = test.select_rows(np.flatnonzero((test.labels > 0) | (np.arange(len(test)) < 9)))
    predictions = found.predict(unbalanced)
    scores = found.score(unbalanced)
    assert scores == {
        "balanced_accuracy": pytest.approx(balanced_accuracy_score(unbalanced.labels, predictions)),
        "accuracy": pytest.approx(accuracy_score(unbalanced.labels, predictions)),
    }
    assert scores["accuracy"] != scores["balanced_accuracy"]


def test_other_tokens_and_rows_are_no_matter(caches):
    """Tokens are found by coordinate, in whatever order a cache has them."""
    train, test = caches
    found = fit_estimator("logistic", train.select(**MIDDLE_MEAN))
    order = np.random.default_rng(0).permutation(len(test))
    np.testing.assert_array_equal(found.predict(test.select_rows(order)), found.predict(test)[order])
    np.testing.assert_array_equal(found.predict(test.select(layers=[2, 3])), found.predict(test))
    assert found.predict(test.select_rows([])).shape == (0,)


def test_padding_is_left_out(caches, tmp_path):
    """Tokens narrower than the cache's widest give what they give by themselves."""
    train, _ = caches
    narrow = train.select(**MIDDLE_MEAN)
    tokens = torch.nn.functional.pad(train.tensors()["layer_features"], (0, 3 * WIDTH))
    padded = write_features(tmp_path, train.labels, tokens).select(**MIDDLE_MEAN)
    for name in ESTIMATORS:
        one, other = fit_estimator(name, narrow), fit_estimator(name, padded)
        assert one.num_parameters == other.num_parameters
        np.testing.assert_array_equal(other.predict(padded), one.predict(narrow))


def test_rows_without_a_label_are_left_out(caches, tmp_path):
    train, test = caches
    labels = train.labels.copy()
    labels[::7] = -100
    tokens = train.tensors()["layer_features"]
    partly = write_features(tmp_path, labels, tokens, label_names=None)
    groups = np.arange(100) // 4
    kept = np.flatnonzero(labels >= 0)
    for name in ESTIMATORS:
        found = fit_estimator(name, partly.select(**TOKENS[name]), groups=groups)
        expected = fit_estimator(name, train.select_rows(kept).select(**TOKENS[name]), groups=groups[kept])
        assert found.setting == expected.setting
        np.testing.assert_array_equal(found.predict(test), expected.predict(test))
        assert found.score(partly) == expected.score(train.select_rows(kept))


def test_classes_keep_their_numbers(caches):
    """Classes without rows, and two classes, of which scikit-learn keeps one set of weights."""
    train, test = caches
    rows = np.flatnonzero(train.labels != 1)
    for name in ESTIMATORS:
        found = fit_estimator(name, train.select_rows(rows).select(**TOKENS[name]))
        assert set(found.predict(test)) == {0, 2}
    assert fit_estimator("logistic", train.select_rows(rows).select(**LAST_CLS)).num_parameters == WIDTH + 1


def test_dtype_of_the_cache(caches, tmp_path):
    """Halves are read as float32: their sums of squares would overflow."""
    train, test = caches
    half = write_features(tmp_path, train.labels, 3e3 * train.tensors()["layer_features"], dtype="float16")
    for name in ESTIMATORS:
        found = fit_estimator(name, half.select(**TOKENS[name]))
        assert found.score(half)["accuracy"] > 0.8
        assert np.mean(found.predict(test) == fit_estimator(name, train.select(**TOKENS[name])).predict(test)) > 0.95


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svm", {}, "estimator 'svm' is unknown: choose from knn, pca, logistic"),
        ("knn", {"values": [5, 2.5]}, "k=2.5 is no whole number"),
        ("knn", {"values": [0]}, "k=0 is no number above 0"),
        ("knn", {"values": [101]}, "k=101, but there are 100 rows"),
        ("knn", {"values": [90, 99]}, "only 80 rows are fitted to"),
        ("pca", {"values": []}, "one or several different values of C"),
        ("pca", {"values": [1, 1.0]}, "different values"),
        ("pca", {"values": "paper"}, "give a list"),
        ("pca", {"values": [float("nan")]}, "no number above 0"),
        ("pca", {"values": [True]}, "no number above 0"),
        ("pca", {"validation_size": 1.5}, "validation_size=1.5 is no share"),
        ("knn", {"num_folds": 1}, "num_folds=1: use 2 or more"),
        ("knn", {"groups": [0, 1]}, "groups is 2 entries long, but there are 100 rows"),
        ("knn", {"num_labels": 2}, "num_labels=2, but there are 3 class names"),
    ],
)
def test_bad_options_are_explained(caches, name, options, message):
    with pytest.raises(LayerFusionError, match=message):
        fit_estimator(name, caches[0].select(**LAST_CLS), **options)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"with_labels": False}, "no labels: extract them with label_column="),
        ({"labels": np.zeros(75, dtype=np.int64)}, "all rows have one class"),
        ({"labels": np.full(75, -100), "label_names": None}, "no labelled row"),
        ({"labels": np.linspace(0, 1, 75), "label_names": None}, "needs class indices"),
        ({"labels": class_labels() - 1, "label_names": None}, "row 0 has label -1"),
        ({"tokens": learnable_tokens(class_labels()).index_fill(0, torch.tensor([40]), torch.nan)}, "row 40.*NaN"),
    ],
    ids=["unlabelled", "one-class", "all-ignored", "numbers", "negative", "nan"],
)
def test_bad_features_are_explained(tmp_path, name, changes, message):
    features = write_features(tmp_path, **{"tokens": learnable_tokens(class_labels()), **changes})
    with pytest.raises(LayerFusionError, match=message):
        fit_estimator(name, features.select(**LAST_CLS))


def test_other_features_than_fitted_to_are_explained(caches, tmp_path):
    train, test = caches
    found = fit_estimator("knn", train.select(**LAST_CLS))
    with pytest.raises(LayerFusionError, match=f"lacks layer {LAYERS} · final_norm · cls"):
        found.predict(test.select(modules=["block"]))
    unlabelled = write_features(tmp_path / "unlabelled", tokens=test.tensors()["layer_features"], with_labels=False)
    np.testing.assert_array_equal(found.predict(unlabelled), found.predict(test))
    with pytest.raises(LayerFusionError, match="no labels"):
        found.score(unlabelled)
    with pytest.raises(LayerFusionError, match="nothing to compare"):
        found.score(test.select_rows([]))
    tokens = test.tensors()["layer_features"].index_fill(0, torch.tensor([3]), torch.inf)
    with pytest.raises(LayerFusionError, match="row 3 of the features holds NaN or infinite values"):
        found.predict(write_features(tmp_path / "infinite", test.labels, tokens))
    for part, value in (("backbone", {"digest": "1"}), ("processor", {"size": 224})):
        other = write_features(tmp_path / part, test.labels, test.tensors()["layer_features"])
        other.manifest.ingredients[part] = value
        with pytest.raises(LayerFusionError, match=f"have another {part} than those"):
            found.predict(other)


def test_a_class_that_only_one_side_has(tmp_path):
    """A single row of a class cannot be split by class, and all of one group can lie on one side."""
    labels = class_labels()
    labels[labels == 2] = 0
    labels[7] = 2
    features = write_features(tmp_path, labels, learnable_tokens(labels))
    with pytest.raises(LayerFusionError, match="cannot be split for validation"):
        fit_estimator("knn", features)
    assert fit_estimator("knn", features, values=[1]).score(features)["accuracy"] == 1
    two = features.select_rows(np.flatnonzero(labels < 2))
    with pytest.raises(LayerFusionError, match="rows left after the validation split have one class"):
        fit_estimator("knn", two, groups=two.labels, num_folds=2)


def test_tokens_without_any_spread(tmp_path):
    """A tap that is the same for all images tells nothing apart, and an all-zero one has no direction."""
    for folder, tokens in (("same", torch.ones(75, len(BANK), WIDTH)), ("zero", torch.zeros(75, len(BANK), WIDTH))):
        features = write_features(tmp_path / folder, tokens=tokens)
        for name in ("knn", "logistic"):
            assert fit_estimator(name, features).score(features)["balanced_accuracy"] == pytest.approx(1 / CLASSES)
        with pytest.raises(LayerFusionError, match="the same in all rows"):
            fit_estimator("pca", features)

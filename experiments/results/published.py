"""The published tables that ``experiments.reproduce`` runs: their configurations and the numbers of their authors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

MNIST = "configs/mnist_sparse_momentum.py"
PAPER = "Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, 2019 (arXiv:1907.04840)"


class Row(NamedTuple):
    """One configuration, run with several seeds.

    Attributes:
      series: the network, or network and protocol, that the row belongs to.
      x: its place in the series: weights kept in %, a prune rate, the name of a variant.
      run: folder of its runs; rows of several tables may share one.
      config: path of a config file, with its argument behind a colon.
      changes: to the config, by key.
      published: test error in % and its standard error, None where the authors give none.
      seeds: the number of seeds that are run by default: 0, ..., seeds - 1.
      stage: of a config with several stages, the one that the row is about; the last part of ``run`` is its name.
    """

    series: str
    x: float | str
    run: str
    config: str
    changes: Mapping[str, Any]
    published: tuple[float, float | None] | None
    seeds: int
    stage: str | None = None


class PaperTable(NamedTuple):
    """The rows of a table, and its text.

    Attributes:
      title: of the table; after a full stop the publication that it is from, if it is from one.
      about: how the runs were made, for the reader of the results.
      x: the name of the column of ``Row.x``.
      rows: in the order of the table; those with x "dense" are baselines.
      others: published test errors in % of other methods, for the picture: label -> {x: error}.
      relative_to: the x whose error is subtracted, where a table is about changes.
      against_kept: draw the errors against the share of weights kept, where x is another quantity.
      with_kept: show the share of weights kept, where neither x nor the picture does.
      footprint: measure the files of the runs too (``experiments.footprint``), and draw the errors against their size.
    """

    title: str
    about: str
    x: str
    rows: tuple[Row, ...]
    others: Mapping[str, Mapping[float, float]] = {}
    relative_to: str | None = None
    against_kept: bool = False
    with_kept: bool = False
    footprint: bool = False

    @property
    def name(self) -> str:
        """The title without the publication."""
        return self.title.partition(". ")[0]

    @property
    def source(self) -> str:
        """The publication, or nothing."""
        return self.title.partition(". ")[2]


def _mnist(model, x, folder, changes, published, seeds, protocol="") -> Row:
    series = {"lenet_300_100": "LeNet-300-100", "lenet5_caffe": "LeNet-5"}[model] + protocol
    suffix = "_all_images" if protocol else ""
    return Row(series, x, f"{model}{suffix}/{folder}", f"{MNIST}:{model}", changes, published, seeds)


def _kept(model, percent, published, seeds, changes=None, protocol="") -> Row:
    changes = {"method.sparsity": round(1 - percent / 100, 6), **(changes or {})}
    return _mnist(model, percent, f"density_{percent:g}", changes, published, seeds, protocol)


def _dense(model, published, seeds, changes=None, protocol="") -> Row:
    return _mnist(model, "dense", "dense", {"dense": True, **(changes or {})}, published, seeds, protocol)


_LENET5_CLIPS = (
    "LeNet-5 is trained with gradients clipped to norm 1, which the paper does not do: without, its loss shoots up "
    "after the first mask updates, and some seeds never recover, with the authors' code too. (The trainer's "
    "`--config.clip_norm=inf` shows it.) "
)
_TABLE_1 = PaperTable(
    f"Sparse momentum, Table 1: MNIST. {PAPER}",
    "100 epochs on the first 54,000 train images, batches of 100, SGD with Nesterov momentum, test error of the last "
    f"epoch. {_LENET5_CLIPS}The paper has 10 to 12 seeds.",
    "weights kept (%)",
    (
        _kept("lenet_300_100", 1, (2.36, 0.044), 5),
        _kept("lenet_300_100", 2, (1.99, 0.019), 5),
        _kept("lenet_300_100", 5, (1.53, 0.020), 5),
        _kept("lenet_300_100", 20, (1.26, 0.017), 5),
        _dense("lenet_300_100", (1.34, 0.011), 5),
        _kept("lenet5_caffe", 5, (0.69, 0.021), 3),
        _dense("lenet5_caffe", (0.58, 0.010), 3),
    ),
)

_VARIANTS = {  # redistribution + growth: the keys that change, and the change of the error in points by network
    "momentum + momentum": ({}, 0.0, 0.0),
    "momentum + random": ({"method.growth": "random"}, 0.07, -0.05),
    "none + momentum": ({"method.redistribution": "none"}, 0.01, 0.32),
    "none + random": ({"method.redistribution": "none", "method.growth": "random"}, 0.11, 0.13),
}
_FOLDERS = ("density_5", "density_5_growth_random", "density_5_redistribution_none")
_TABLE_5 = PaperTable(
    f"Sparse momentum, Table 5: ablations on MNIST at 5% of the weights. {PAPER}",
    f"The recipe of Table 1, with other choices of redistribution and growth. {_LENET5_CLIPS}The paper gives changes "
    "of the error against momentum + momentum, without standard errors.",
    "redistribution + growth",
    tuple(
        _mnist(model, name, folder, changes, (round(error + (to_300, to_5)[i], 2), None), 3)
        for i, (model, error) in enumerate((("lenet_300_100", 1.53), ("lenet5_caffe", 0.69)))
        for folder, (name, (changes, to_300, to_5)) in zip(
            (*_FOLDERS, "density_5_redistribution_none_growth_random"), _VARIANTS.items(), strict=True
        )
    ),
    relative_to="momentum + momentum",
)

_ALL_IMAGES = {"data.validation": 0.0}
_FIGURE_2 = PaperTable(
    f"Sparse momentum, Figure 2 left: MNIST, no images held out. {PAPER}",
    "The protocol of Mostafa and Wang (2019): the recipe of Table 1 on all 60,000 train images. The errors of the "
    "other methods in the picture are those that the authors report.",
    "weights kept (%)",
    (
        *(
            _kept("lenet_300_100", percent, published, 3, _ALL_IMAGES, ", 60,000 images")
            for percent, published in {
                1: (2.47, 0.047),
                2: (1.80, 0.018),
                3: (1.70, 0.055),
                4: (1.58, 0.023),
                5: (1.47, 0.033),
                10: (1.33, 0.026),
            }.items()
        ),
        _dense("lenet_300_100", (1.31, None), 3, _ALL_IMAGES, ", 60,000 images"),
    ),
    others={
        "dynamic sparse reparameterisation": {1: 2.46, 2: 1.86, 3: 1.80, 4: 1.77, 5: 1.68, 10: 1.56},
        "SET": {1: 4.2, 2: 2.259, 3: 1.940, 4: 1.904, 5: 1.855, 10: 1.608},
        "DEEP R": {1: 6.0, 2: 1.79, 3: 1.78, 4: 1.70, 5: 1.94, 10: 1.81},
    },
)

_PRUNE_RATES = PaperTable(
    f"Sparse momentum: sensitivity to the prune rate. {PAPER}",
    "LeNet-300-100 with 5% of the weights, the recipe of Table 1, other initial prune rates (cosine decay). The paper "
    "reports this for CIFAR-10 only, where rates from 0.2 to 0.7 differ little.",
    "prune rate",
    tuple(
        _mnist(
            "lenet_300_100",
            rate,
            "density_5" if rate == 0.5 else f"density_5_prune_rate_{rate}",
            {"method.prune_rate.init_value": rate},
            (1.53, 0.020) if rate == 0.5 else None,
            3,
        )
        for rate in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    ),
)

COMPRESSED_SENSING = "Siegel, Chen, Zhang and Xu, *Training Sparse Neural Networks using Compressed Sensing*, 2020"


def _rda(model, l1, seeds) -> Row:
    series = {"lenet_300_100": "LeNet-300-100, rda", "lenet5_caffe": "LeNet-5, rda"}[model]
    config = f"configs/mnist_rda.py:{model}"
    return Row(series, f"l1 = {l1:g}", f"{model}/rda_l1_{l1:g}", config, {"method.l1": l1}, None, seeds)


def _in_bfloat16(row: Row) -> Row:
    series, run = f"{row.series}, state in bfloat16", f"{row.run}_bfloat16"
    return row._replace(series=series, run=run, changes={**row.changes, "method.state_dtype": "bfloat16"})


def _beside(model, percent, seeds) -> Row:
    row = _kept(model, percent, None, seeds)
    return row._replace(series=f"{row.series}, sparse momentum", x=f"{percent:g}%")


_RDA_L1 = PaperTable(
    f"Training with compressed sensing on MNIST: the choice of l1. {COMPRESSED_SENSING} (arXiv:2008.09661)",
    "From random weights by the authors' CIFAR recipe (step size 1, cosine, momentum time 9.5, weight decay 5e-4, M = "
    "500), 100 epochs on the first 54,000 train images, batches of 100. LeNet-5's gradients are clipped to norm 1. "
    "Validation: the error on the other 6,000.",
    "setting",
    (
        *(_rda("lenet_300_100", l1, 1) for l1 in (5e-7, 1e-6, 2e-6, 3e-6, 5e-6, 8e-6, 1.2e-5)),
        *(_rda("lenet5_caffe", l1, 1) for l1 in (3e-6, 5e-6, 1e-5)),
    ),
    against_kept=True,
)
_RDA = PaperTable(
    f"Training with compressed sensing on MNIST, beside sparse momentum. {COMPRESSED_SENSING} (arXiv:2008.09661)",
    "The recipe of rda_mnist_l1, by whose validation errors l1 was chosen: the best that keep at most 1.2, 3.2 "
    "and 8% of the weights, of LeNet-5 1.2%. Sparse momentum as in its Table 1, told to keep as many. The paper has no "
    "MNIST.",
    "setting",
    (
        *(_rda("lenet_300_100", l1, 5) for l1 in (8e-6, 3e-6, 1e-6)),
        _in_bfloat16(_rda("lenet_300_100", 8e-6, 5)),
        *(_beside("lenet_300_100", percent, 5) for percent in (1.2, 3.2, 8)),
        _rda("lenet5_caffe", 3e-6, 1),
    ),
    against_kept=True,
)


def _l0(argument, series, penalty, seeds) -> Row:
    changes = {"method.penalty.strength": penalty}
    return Row(series, f"{penalty:g}", f"l0/{argument}", f"configs/mnist_l0.py:{argument}", changes, None, seeds)


_L0 = PaperTable(
    "L0 regularisation on MNIST. Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 "
    "Regularization*, 2018 (arXiv:1712.01312); Li and Ji, *Dep-L0*, 2021 (arXiv:2107.00070)",
    "All 60,000 train images, batches of 100, Adam, gates frozen in the last fifth of 100 epochs (LeNet-300-100) or 40 "
    "(LeNet-5), test error of the last epoch. The strength of the penalty was chosen by how many weights it leaves. "
    "Kept: the share of the params of the model without its closed channels; its inputs and units, or filters, "
    "flattened inputs and units, stand in brackets. Louizos et al. are cited with 1.4% for 219-214-100 and 1.8% for "
    "266-88-33 (LeNet-300-100), 0.9% for 20-25-45-462 and 1.0% for 9-18-65-25 (LeNet-5); Li and Ji have no MNIST.",
    "penalty",
    (
        _l0("lenet_300_100", "LeNet-300-100, l0", 0.22, 3),
        _l0("lenet_300_100_dep", "LeNet-300-100, dep_l0", 0.2, 3),
        _l0("lenet5_caffe", "LeNet-5, l0", 0.22, 1),
        _l0("lenet5_caffe_dep", "LeNet-5, dep_l0", 0.2, 1),
    ),
    against_kept=True,
)

ASNI = "Damadi, Nouri and Pirsiavash, *Amenable Sparse Network Investigator*, 2022 (arXiv:2202.09284)"
_STAGES = {
    "dense": "dense",
    "asni_1": "ASNI-I",
    "asni_2": "ASNI-II",
    "asni_2_biases": "ASNI-II, biases too",
    "original": "original weights",
}


def _asni(series, folder, experiment, published, seeds, changes=None, dense=None) -> tuple[Row, ...]:
    """A row for each stage; ``published`` has the accuracies in % of the author's log, their deviations and runs."""
    rows = []
    for stage, name in _STAGES.items():
        accuracy, deviation, runs = published.get(stage, (None, None, None))
        error = None if accuracy is None else (round(100 - accuracy, 2), deviation and deviation / (runs - 1) ** 0.5)
        mine = {**(changes or {}), **(dense or {} if stage == "dense" else {})}
        config = f"configs/stages/asni.py:{experiment}"
        rows.append(Row(series, name, f"{folder}/{stage}", config, mine, error, seeds, stage))
    return tuple(rows)


_ASNI = PaperTable(
    f"ASNI on MNIST. {ASNI}",
    "LeNet-300-100 by the author's recipe: 50 epochs of all 60,000 train images, batches of 60, Adam, 1.2e-4 (dense: "
    "1.2e-3), pruned to 96.9% zeros. ASNI-II starts from two numbers a layer, on the masks and signs of ASNI-I; in "
    '"biases too" biases start from two numbers as well, and "original weights" are those that ASNI-I started from. '
    "The paper's column has the means of the author's logs, which have no run of ASNI-II with biases of 0.",
    "start",
    _asni(
        "LeNet-300-100",
        "asni_mnist/fc",
        "mnist_fc",
        {
            "dense": (98.06, 0.10, 5),
            "asni_1": (97.62, None, None),
            "asni_2_biases": (97.83, 0.06, 9),
            "original": (97.89, None, None),
        },
        3,
        dense={"optimizer.learning_rate": 1.2e-3},
    ),
    with_kept=True,
)
_ASNI_CONV2 = PaperTable(
    f"ASNI on MNIST, Conv-2 in 5 epochs. {ASNI}",
    "Not the author's run, which has 20 epochs: 5 epochs of all 60,000 train images, the sigmoid steeper (scale "
    "0.375) and earlier (translation 0.3) to fit into them, so that four prunings end at the author's 97.4% zeros; the "
    "learning rate 2e-4 as it is. ASNI-I therefore has one epoch left to recover where the author's has several. The "
    "author's 20 epochs: dense 99.06, ASNI-I 99.06, ASNI-II 99.14, biases too 99.10, original weights 99.18% accuracy.",
    "start",
    _asni("Conv-2", "asni_mnist/conv2_5_epochs_early", "mnist_conv2", {}, 1, {
        "epochs": 5, "method.sparsity.scale_epochs": 0.375, "method.sparsity.translation": 0.3,
    }),
    with_kept=True,
)  # fmt: skip

_MLP_BLOCKS = "configs/mnist_mlp.py"
_MLP_WEIGHTS = "configs/mnist_mlp.py:weights"
_MLP = PaperTable(
    "An MLP of 2,048 units a layer on MNIST: sparse momentum by blocks",
    "5 epochs, a tenth of the train images held out, 10% of the weights kept: by single weights, and by blocks of 112 "
    "x 128 and 128 x 128 (the last layer by single weights) whose dead ones the layers skip. With 20 steps only the "
    "last 20 steps before a change of masks have gradients of all weights. Nothing here is from a paper.",
    "what is kept",
    (
        Row("MLP", "dense", "mnist_mlp/dense", _MLP_WEIGHTS, {"dense": True}, None, 3),
        Row("MLP", "weights", "mnist_mlp/weights", _MLP_WEIGHTS, {}, None, 3),
        Row("MLP", "blocks", "mnist_mlp/blocks", _MLP_BLOCKS, {}, None, 3),
        Row(
            "MLP", "blocks, 20 steps", "mnist_mlp/blocks_20", _MLP_BLOCKS,
            {"dense_gradient_steps": 20}, None, 3,
        ),
    ),
    with_kept=True,
)  # fmt: skip


def _resnet8(series, x, folder, argument, changes, seeds=1, published=None, stage=None) -> Row:
    config = f"configs/{'stages/asni.py:cifar10_resnet8' if stage else f'cifar10_resnet8.py:{argument}'}"
    return Row(series, x, f"cifar10_resnet8/{folder}", config, changes, published, seeds, stage)


def _resnet8_at(percent, series, argument, seeds=1) -> Row:
    """The row of a method at so many % zeros."""
    changes = {"method.sparsity": percent / 100}
    return _resnet8(series, f"{percent}% zeros", f"{argument}_{percent}", argument, changes, seeds)


def _resnet8_rda(l1, argument="rda") -> Row:
    series = "rda" if argument == "rda" else "rda by channels"
    return _resnet8(series, f"l1 = {l1:g}", f"{argument}_l1_{l1:g}", argument, {"method.l1": l1})


def _resnet8_gates(method, strength) -> Row:
    changes = {"method.penalty.strength": strength}
    return _resnet8(method, f"penalty {strength:g}", f"{method}_{strength:g}", method, changes)


_RESNET8_TABLE = PaperTable(
    "ResNet-8 of MLPerf Tiny on CIFAR-10: accuracy and size of the file",
    "25 epochs of all 50,000 train images, batches of 32, padded by 2 pixels, cropped and mirrored. The optimizer is "
    "Muon for convolutions and Adam for the rest, but for the rows that say SGD and for rda, which is an optimizer "
    "itself. The paper of the dense row is the reference of MLPerf Tiny, 87.0% after 500 epochs. Files are those of "
    "`jaxsparse.save_sparse`, with batch normalisation folded into the layers, and without closed channels; "
    "multiply-adds that are by zeros are left out.",
    "setting",
    (
        _resnet8("ResNet-8", "dense", "dense", "dense", {}, 2, (13.0, None)),
        _resnet8_at(80, "sparse momentum", "sparse_momentum"),
        _resnet8_at(90, "sparse momentum", "sparse_momentum", seeds=2),
        _resnet8_at(95, "sparse momentum", "sparse_momentum"),
        _resnet8_at(90, "rigl", "rigl"),
        _resnet8_rda(3.5e-6),
        _resnet8_at(90, "gradual magnitude", "magnitude_pruning"),
        _resnet8_gates("dep_l0", 1e-6),
        _resnet8_gates("l0", 1e-6),
        *(
            _resnet8("asni", name, f"asni/{stage}", "asni", {}, stage=stage)
            for stage, name in (("asni_1", "ASNI-I"), ("asni_2", "ASNI-II"), ("original", "original weights"))
        ),
        _resnet8_at(90, "sparse momentum, SGD", "sparse_momentum_sgd"),
        _resnet8_at(90, "gradual magnitude, SGD", "magnitude_pruning_sgd"),
        _resnet8_rda(2e-6),
        _resnet8_rda(6e-6),
        _resnet8_at(90, "set", "sparse_evolutionary"),
        _resnet8("sr_ste", "2:4", "sr_ste", "sr_ste", {}),
        _resnet8_rda(1e-7, "rda_channel"),
    ),
    against_kept=True,
    footprint=True,
)

TABLES = {
    "asni_mnist": _ASNI,
    "asni_mnist_conv2": _ASNI_CONV2,
    "cifar10_resnet8": _RESNET8_TABLE,
    "l0_mnist": _L0,
    "mnist_mlp": _MLP,
    "rda_mnist": _RDA,
    "rda_mnist_l1": _RDA_L1,
    "sparse_momentum_table_1": _TABLE_1,
    "sparse_momentum_table_5": _TABLE_5,
    "sparse_momentum_figure_2_left": _FIGURE_2,
    "sparse_momentum_prune_rates": _PRUNE_RATES,
}

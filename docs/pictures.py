"""Draws the pictures of these pages, light and dark: ``python docs/pictures.py``, about a minute on two cores.

``python docs/pictures.py NAME ...`` draws the named ones only. They are computed here, by the library, with small
networks trained on scikit-learn's digits (images of 8 x 8 pixels, 1,437 to train with); "methods" is drawn from the
committed results of MNIST.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

import jaxsparse

FOLDER = Path(__file__).parent / "_static"
RESULTS = Path(__file__).parents[1] / "results"
# Okabe and Ito's colours, which colour-blind people tell apart; those that a dark page swallows are exchanged.
COLOURS = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"],
    "dark": ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442"],
}
INK = {"light": ("#1f2328", "#ffffff", "#c4c9cf"), "dark": ("#d8dce2", "#131416", "#4a4f57")}
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
BATCH = 32


# --- Networks and their training -------------------------------------------------------------------------------------


def digits() -> tuple[jax.Array, jax.Array]:
    """Train images, scaled to mean 0 and variance 1, and labels."""
    data = load_digits()
    images = jnp.asarray(data.data[:1437], jnp.float32)
    return (images - images.mean()) / images.std(), jnp.asarray(data.target[:1437])


def network(widths: tuple[int, ...], key: int = 0) -> dict:
    """Params of a perceptron with ReLU."""
    keys = jax.random.split(jax.random.key(key), len(widths) - 1)
    return {
        f"fc{i + 1}": {
            "kernel": jax.random.normal(k, (widths[i], widths[i + 1])) * (2 / widths[i]) ** 0.5,
            "bias": jnp.zeros(widths[i + 1]),
        }
        for i, k in enumerate(keys)
    }


def loss(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy."""
    x = images
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == max(params) else jax.nn.relu(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def train(tx: optax.GradientTransformation, params: dict, epochs: int, measure=None):
    """Params, optimizer state, and what ``measure(opt_state, params)`` gave after each epoch, stacked."""
    images, labels = digits()
    opt_state = tx.init(params)
    with contextlib.suppress(ValueError):  # of a dense optimizer
        params = jaxsparse.sparsify(opt_state, params)

    def step(carry, chosen):
        params, opt_state = carry
        grads = jax.grad(loss)(params, images[chosen], labels[chosen])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(images))[
            : len(images) // BATCH * BATCH
        ].reshape(-1, BATCH)
        carry, _ = jax.lax.scan(step, carry, order)
        return carry, measure(carry[1], carry[0]) if measure else 0.0

    keys = jax.random.split(jax.random.key(1), epochs)
    (params, opt_state), measured = jax.jit(lambda carry: jax.lax.scan(epoch, carry, keys))(
        (params, opt_state)
    )
    return params, opt_state, jax.device_get(measured)


STEPS = 1437 // BATCH  # of an epoch


# --- Pictures --------------------------------------------------------------------------------------------------------

# label -> table in results/, its rows of LeNet-300-100, colour, marker
MEASURED = {
    "sparse_momentum": (
        "sparse_momentum_table_1",
        [f"lenet_300_100/density_{kept}" for kept in (1, 2, 5, 20)],
        "C0",
        "o-",
    ),
    "rda": (
        "rda_mnist",
        [f"lenet_300_100/rda_l1_{l1}" for l1 in ("8e-06", "3e-06", "1e-06")],
        "C1",
        "s-",
    ),
    "asni (ASNI-I)": ("asni_mnist", ["asni_mnist/fc/asni_1"], "C2", "v"),
    "ASNI-II": ("asni_mnist", ["asni_mnist/fc/asni_2"], "C2", "^"),
    "l0": ("l0_mnist", ["l0/lenet_300_100"], "C3", "D"),
    "dep_l0": ("l0_mnist", ["l0/lenet_300_100_dep"], "C4", "P"),
}


def measured(table: str, row: str) -> tuple[float, float, float]:
    """Weights kept, test accuracy and the standard error of that, in %: means over the seeds of a row."""
    runs = list(json.loads((RESULTS / f"{table}.json").read_text())[row].values())
    accuracies = np.array([100 - run["test_error"] for run in runs])
    error = accuracies.std(ddof=1) / len(runs) ** 0.5
    return np.mean([run["kept"] for run in runs]), accuracies.mean(), error


def methods():
    """Accuracy against weights kept of all methods that were measured on MNIST, from ``results/``."""
    points = {
        label: np.array([measured(table, row) for row in rows]).T
        for label, (table, rows, _, _) in MEASURED.items()
    }
    _, dense, error = measured("sparse_momentum_table_1", "lenet_300_100/dense")

    def draw(figure):
        axes = figure.subplots()
        axes.axhspan(dense - error, dense + error, color="grey", alpha=0.25, linewidth=0)
        axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label="dense")
        for label, (kept, accuracy, errors) in points.items():
            _, _, colour, marker = MEASURED[label]
            axes.errorbar(
                kept, accuracy, errors, fmt=marker, color=colour, capsize=3, label=label
            )
        ticks = [1, 2, 3, 5, 10, 20]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel="weights kept (%)",
            ylabel="test accuracy (%)",
            title="LeNet-300-100 on MNIST, each method with a recipe of its own",
        )
        figure.legend(loc="outside right center")

    return draw


def sparse_momentum():
    """Where sparse momentum moves the weights, and the momentum that it follows."""
    epochs = 40
    tx = jaxsparse.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        jaxsparse.sparse_momentum(
            0.9, STEPS, prune_rate=jaxsparse.cosine_prune_rate(0.5, epochs * STEPS)
        ),
    )

    def densities(opt_state, params):
        return {
            path: jnp.mean(m["kernel"])
            for path, m in jaxsparse.get_masks(opt_state, params).items()
        }

    _, _, measured = train(tx, network((64, 300, 100, 10)), epochs, densities)
    rate = jaxsparse.cosine_prune_rate(0.5, epochs * STEPS)

    def draw(figure):
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for style, (name, values) in zip(STYLES, measured.items(), strict=False):
            left.plot(np.arange(1, epochs + 1), 100 * values, linestyle=style, label=name)
        left.axhline(10, color="grey", linewidth=0.8)
        left.set(
            xlabel="epoch",
            ylabel="weights kept (%)",
            ylim=(0, None),
            title="Layers, all together 10%",
        )
        left.legend()
        steps = np.arange(epochs * STEPS)
        right.plot(steps / STEPS, 100 * np.asarray(rate(steps)))
        right.set(
            xlabel="epoch",
            ylabel="prune rate: weights replaced (%)",
            ylim=(0, None),
            title="Prune rate (drop fraction)",
        )

    return draw


def reweighted_l1():
    """By how much a weight is shrunk, and how zeros come while training."""
    x = np.linspace(0, 1, 400)
    factor = 500.0
    weights = factor / (1 + (factor - 1) * x)
    epochs, strengths = 40, (1e-5, 3e-5, 1e-4)
    step_size, averaging = jaxsparse.rda_cosine(1.0, epochs * STEPS)
    curves = {}
    for l1 in strengths:
        tx = jaxsparse.rda(step_size, l1=l1, averaging=averaging, weight_decay=5e-4)
        _, _, curves[l1] = train(
            tx,
            network((64, 300, 100, 10)),
            epochs,
            lambda opt_state, params: jaxsparse.density(jaxsparse.get_masks(opt_state, params)),
        )

    def draw(figure):
        left, right = figure.subplots(1, 2)
        left.plot(x, weights, label="reweighted")
        left.plot(x, np.ones_like(x), linestyle="--", label="plain l1 (max_factor=1)")
        left.set(
            xlabel="size of a weight / largest of its layer",
            ylabel="shrunk by (multiples of l1)",
            yscale="log",
        )
        left.set(title="Small weights are shrunk most", ylim=(0.5, 800))
        left.legend()
        for style, (l1, kept) in zip(STYLES, curves.items(), strict=False):
            right.plot(
                np.arange(1, epochs + 1), 100 * kept, linestyle=style, label=f"l1={l1:g}"
            )
        right.set(
            xlabel="epoch",
            ylabel="weights kept (%)",
            title="Zeros come while training",
            ylim=(0, 102),
        )
        right.legend()

    return draw


def l0():
    """The distribution of a gate, and its values for evaluation."""
    uniform = (np.arange(100_000) + 0.5) / 100_000
    log_alpha = np.linspace(-5, 5, 401)
    gates = [
        jaxsparse.hard_concrete(jnp.full(uniform.shape, a), uniform) for a in (-2.0, 0.0, 2.0)
    ]

    def draw(figure):
        left, right = figure.subplots(1, 2)
        for style, z in zip(STYLES, gates, strict=False):
            left.plot(uniform, z, linestyle=style)
        for i, (x, y, a) in enumerate([(0.68, 0.18, -2), (0.55, 0.4, 0), (0.24, 0.62, 2)]):
            left.text(
                x, y, rf"$\log\alpha$ = {a}", color=f"C{i}", ha="right" if a < 0 else "left"
            )
        left.set(
            xlabel="u, the random number",
            ylabel="z, the gate",
            title="A gate is often exactly 0 or 1",
        )
        right.plot(log_alpha, jaxsparse.prob_open(log_alpha))
        right.plot(log_alpha, jaxsparse.hard_concrete_mean(log_alpha), linestyle="--")
        right.text(-1.1, 0.72, "prob_open:\nprobability of z > 0", color="C0", ha="right")
        right.text(0.7, 0.3, "hard_concrete_mean:\nthe test-time gate", color="C1")
        right.set(
            xlabel=r"$\log\alpha$, the learned location",
            title=r"The gate against $\log\alpha$",
            ylim=(-0.04, 1.04),
        )

    return draw


def dep_l0():
    """Open channels while training, with gates that do and do not depend on each other."""
    params = network((64, 100, 60, 10))
    groups = [
        jaxsparse.Group("pixels", {"fc1/kernel": 0}, {"fc1/kernel": 0}),
        jaxsparse.Group(
            "fc1", {"fc2/kernel": 0}, {"fc1/kernel": -1, "fc1/bias": 0, "fc2/kernel": 0}
        ),
        jaxsparse.Group(
            "fc2", {"fc3/kernel": 0}, {"fc2/kernel": -1, "fc2/bias": 0, "fc3/kernel": 0}
        ),
    ]
    epochs, penalty = 60, jaxsparse.Penalty(0.4, examples=1437)
    gates = optax.adam(1e-2)
    makers = {
        "l0": lambda: jaxsparse.l0(
            optax.adam(1e-3), groups, penalty=penalty, log_alpha=3.0, gate_optimizer=gates
        ),
        "dep_l0": lambda: jaxsparse.dep_l0(optax.adam(1e-3), groups, penalty=penalty),
    }
    curves = {}
    for name, make in makers.items():
        _, _, curves[name] = train(
            make(),
            params,
            epochs,
            lambda opt_state, params: {
                group: jnp.mean(jaxsparse.hard_concrete_mean(a) > 0)
                for group, a in jaxsparse.get_log_alpha(opt_state).items()
            },
        )

    def draw(figure):
        for axes, (name, shares) in zip(
            figure.subplots(1, 2, sharey=True), curves.items(), strict=True
        ):
            for style, (group, values) in zip(
                STYLES, sorted(shares.items(), key=lambda s: s[0] != "pixels"), strict=False
            ):
                axes.plot(np.arange(1, epochs + 1), 100 * values, linestyle=style, label=group)
            axes.set(xlabel="epoch", title=name, ylim=(0, 102))
        figure.axes[0].set_ylabel("channels open in evaluation (%)")
        figure.axes[0].legend(loc="lower left")

    return draw


def asni():
    """Sparsity schedules, and the two numbers about which the weights that are left gather."""
    epochs = 50
    last = (epochs - 1) * STEPS  # the step of the last pruning
    schedules = {
        "sigmoid": jaxsparse.sigmoid_sparsity(0.95, epochs * STEPS, 5 * STEPS, begin=STEPS),
        "cubic": optax.polynomial_schedule(0.0, 0.95, power=3, transition_steps=last),
        "linear": optax.linear_schedule(0.0, 0.95, last),
    }
    tx = optax.chain(optax.adam(1e-3), jaxsparse.asni(schedules["sigmoid"], STEPS))
    params, opt_state, _ = train(tx, network((64, 300, 100, 10)), epochs)
    masks = jaxsparse.get_masks(opt_state, params)
    means = jaxsparse.centroids(params, masks)["fc2/kernel"]
    kept = np.asarray(params["fc2"]["kernel"])[np.asarray(masks["fc2"]["kernel"])]

    def draw(figure):
        left, right = figure.subplots(1, 2)
        step = np.arange(last + 1)
        for style, (name, schedule) in zip(STYLES, schedules.items(), strict=False):
            zeros = 100 * np.asarray(schedule(step))
            left.plot(step / STEPS, zeros, linestyle=style, label=name)
        left.set(xlabel="epoch", ylabel="zeros (%)", title="Schedules", ylim=(0, 100))
        left.legend(loc="lower right")
        right.hist(kept, bins=60)
        for mean, label in zip(means, ("centroids", None), strict=True):
            right.axvline(float(mean), linestyle="--", color="C1", label=label)
        right.set(
            xlabel="weight",
            ylabel="number of weights",
            title=f"fc2 after ASNI-I: {len(kept):,} of 30,000 left",
        )
        right.legend()

    return draw


def mask_updates():
    """Which pixels the first layer reads, by three kinds of masks."""
    params = network((64, 300, 100, 10))
    dense, _, _ = train(
        optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)), params, 20
    )
    tx = jaxsparse.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        jaxsparse.sparse_momentum(
            0.95, STEPS, prune_rate=jaxsparse.cosine_prune_rate(0.5, 40 * STEPS)
        ),
    )
    grown, opt_state, _ = train(tx, params, 40)
    found = {
        "random_masks": jaxsparse.random_masks(params, 0.95),
        "magnitude_masks": jaxsparse.magnitude_masks(dense, 0.95),
        "sparse_momentum": jaxsparse.get_masks(opt_state, grown),
    }
    reads = {
        name: np.asarray(masks["fc1"]["kernel"]).sum(1).reshape(8, 8)
        for name, masks in found.items()
    }

    def draw(figure):
        most = max(counts.max() for counts in reads.values())
        for axes, (name, counts) in zip(figure.subplots(1, 3), reads.items(), strict=True):
            image = axes.imshow(counts, cmap="cividis", vmin=0, vmax=most)
            axes.set(title=name, xticks=[], yticks=[])
        figure.colorbar(image, ax=figure.axes, label="weights kept of 300", shrink=0.9)

    return draw


def structures():
    """One matrix and four structures that keep about a half of it."""
    params = {"kernel": jax.random.normal(jax.random.key(3), (16, 16))}
    units = {
        '"weight"': "weight",
        "block(4, 4)": jaxsparse.block(4, 4),
        "n_of_m(2, 4)": jaxsparse.n_of_m(2, 4),
        "channel": {"kernel": "channel"},
    }
    masks = {
        name: np.asarray(jaxsparse.magnitude_masks(params, 0.5, structure=unit)["kernel"])
        for name, unit in units.items()
    }

    def draw(figure):
        _, paper, line = INK[figure.theme]
        for axes, (name, mask) in zip(
            figure.subplots(1, 4, sharey=True), masks.items(), strict=True
        ):
            axes.pcolormesh(
                ~mask[::-1],
                cmap=mpl.colors.ListedColormap(["C0", paper]),
                edgecolors=line,
                linewidth=0.3,
            )
            axes.set(title=name, xticks=[], yticks=[], aspect="equal", xlabel="outputs")
        figure.axes[0].set_ylabel("inputs")

    return draw


PICTURES = {
    "methods": (methods, (7.4, 3.4)),
    "sparse_momentum": (sparse_momentum, (7.4, 2.9)),
    "reweighted_l1": (reweighted_l1, (7.4, 2.9)),
    "l0": (l0, (7.4, 2.9)),
    "dep_l0": (dep_l0, (7.4, 2.9)),
    "asni": (asni, (7.4, 2.9)),
    "mask_updates": (mask_updates, (7.4, 2.6)),
    "structures": (structures, (7.4, 2.3)),
}


def save(figure: Figure, path: Path) -> None:
    """With few colours, which keeps the file small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    Image.open(buffer).convert("RGB").quantize(96).save(path, optimize=True)


def style(theme: str) -> dict:
    """Settings of matplotlib: the colours of a theme, and small letters."""
    ink, paper, line = INK[theme]
    return {
        "axes.prop_cycle": mpl.cycler(color=COLOURS[theme]),
        "font.size": 9,
        "axes.titlesize": 9.5,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": line,
        "axes.facecolor": paper,
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
        "axes.labelcolor": ink,
    }


def main() -> None:
    """Draws those that the command line names, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        compute, size = PICTURES[name]
        draw = compute()
        for theme in INK:
            with mpl.rc_context(style(theme)):
                figure = Figure(figsize=size, layout="constrained")
                figure.theme = theme
                draw(figure)
                path = FOLDER / f"{name}_{theme}.png"
                save(figure, path)
                print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()

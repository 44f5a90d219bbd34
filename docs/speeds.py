"""Numbers of the committed benchmarks, for the tables of docs/benchmarks.md, which ``python -m docs.tables`` writes."""

from docs.evidence import SPEED, cell


def speed(benchmark: str, column: str, **where: str) -> str:
    """One cell of the tables of a benchmark."""
    return cell(SPEED / f"{benchmark}_cpu.md", column, **where)


def times(benchmark: str, column: str, **where: str) -> str:
    """A ratio, or a speed, to two digits."""
    return f"{float(speed(benchmark, column, **where)):#.2g}"


def updates() -> list[tuple[str, str]]:
    """One update of a ResNet-50."""

    def row(link: str, column: str = "ratio") -> list[str]:
        return [
            speed("update", column, optimizer=optimizer, link=link)
            for optimizer in ("SGD momentum", "Adam")
        ]

    links = {
        "sparse_momentum": "`sparse_momentum`",
        "rigl": "`rigl`",
        "asni": "`asni`",
        "magnitude_pruning, global": '`magnitude_pruning(scope="global")`',
    }
    found = []
    for link, shown in links.items():
        sgd, adam = row(link)
        found.append((f"{shown}, no mask changed", f"{sgd} (SGD momentum), {adam} (Adam)"))
    in_optax = row("sparse_momentum", "ratio in a plain optax.chain")
    found.append(("`sparse_momentum` in a plain `optax.chain`", "{}, {}".format(*in_optax)))
    for link, shown in links.items():
        sgd, adam = row(link, "mask update, ms")
        found.append((f"the masks of all layers changed by {shown}", f"{sgd} ms, {adam} ms"))
    moved = [
        float(speed("rda", "bytes moved a parameter", optimizer=name))
        for name in ("rda, weight", "SGD momentum")
    ]
    rda = [
        speed("rda", "times", optimizer=f"rda, {unit}")
        for unit in ("weight", "kernel", "channel")
    ]
    gates = [speed("gates", "times", optimizer=name) for name in ("l0", "dep_l0, forward")]
    return [
        *found,
        (
            "`rda`, against SGD momentum",
            f"{rda[0]}, for {moved[0] / moved[1]:.1f} times the bytes moved (by kernels {rda[1]}, by filters {rda[2]})",
        ),
        (
            "gates on 33 groups of channels",
            "`l0` {}, `dep_l0` {}".format(*gates),
        ),
    ]


def training() -> list[tuple[str, str]]:
    """Whole train steps."""
    mlp = {
        batch: {
            name: times("mlp", "of dense", batch=batch, kept_by=kept)
            for name, kept in (("all", "blocks"), ("20", "blocks, dense gradients on 20 steps"))
        }
        for batch in ("100", "500")
    }
    fc, conv = ({"network": name} for name in ("lenet_300_100", "lenet5_caffe"))
    cifar = {
        network: [
            speed("cifar", "images/s", network=network, method=method)
            for method in ("dense", "rda", "sparse momentum")
        ]
        for network in ("vgg16", "resnet20")
    }
    large = {
        config: speed("imagenet", "sparse / dense", config=config)
        for config in ("sparse_momentum_10", "asni_80", "l0_hc", "dep_l0_forward", "rda")
    }
    jpeg = {"images": "ImageNet-like", "way": "experiments.pictures"}
    return [
        (
            "LeNet-300-100, 5% kept, batches of 100",
            f"{speed('training', 'sparse, 5% kept', **fc)} steps per second: "
            f"{times('training', 'sparse / dense', **fc)} of the dense network's, "
            f"{speed('training', 'PyTorch with a DataLoader', **fc)} by dense PyTorch with a `DataLoader` and one "
            "thread",
        ),
        (
            "LeNet-5, the same",
            f"{speed('training', 'sparse, 5% kept', **conv)} steps per second: "
            f"{times('training', 'sparse / dense', **conv)} of the dense network's, "
            f"{speed('training', 'PyTorch with a DataLoader', **conv)} by PyTorch",
        ),
        (
            "an MLP of 2,048 units per layer by blocks, 10% kept, batches of 500",
            f"{mlp['500']['20']} times dense with gradients of all weights on the last 20 steps before masks change, "
            f"{mlp['500']['all']} times with them on every step",
        ),
        (
            "the same in batches of 100",
            f"{mlp['100']['20']} and {mlp['100']['all']} times dense",
        ),
        (
            "VGG16 on CIFAR-10, batches of 32, one core",
            "images per second: dense {}, `rda` {}, `sparse_momentum` {} (ResNet-20: {}, {}, {})".format(
                *cifar["vgg16"], *cifar["resnet20"]
            ),
        ),
        (
            "ResNet-50, 64 x 64 pixels, batches of 16",
            "`sparse_momentum` {sparse_momentum_10}, `asni` {asni_80}, `l0` {l0_hc}, `dep_l0` {dep_l0_forward}, "
            "`rda` {rda} of the dense speed".format(**large),
        ),
        (
            "from JPEG files like ImageNet's to random crops of 224 x 224",
            f"{speed('input_pipeline', 'images/s per core', **jpeg)} images per second and core, "
            f"{times('input_pipeline', 'faster than Pillow', **jpeg)} times plain Pillow",
        ),
    ]


def products() -> list[tuple[str, str]]:
    """Products and smaller models."""

    def blocks(side: int, left: str) -> str:
        # Two columns are called so; the second, with gradients, is the one that cell() finds.
        return times("kernels", "dense / ours", unit=f"block {side}", live_work_left=left)

    slim = {
        network: times("slim", "times faster", network=network)
        for network in ("VGG16", "ResNet-56", "LeNet-5")
    }
    smaller = {
        (model, what): times("trace_slim", "times faster", model=model, **{"": what})
        for model in ("NNX", "Linen, scan and remat")
        for what in ("forward", "train step")
    }
    linen = "Linen, scan and remat"
    unchanged = [
        times("trace_sparse", "times as fast", width__blocks=size)
        for size in ("256, 4", "1024, 2")
    ]
    return [
        (
            "product of 2048 x 2048 matrices and both its gradients, 10% of the 128 x 128 blocks alive",
            f"{blocks(128, '10.2%')} times faster than dense (blocks of 64: {blocks(64, '10.0%')} times; 5% alive: "
            f"{blocks(128, '5.1%')} and {blocks(64, '5.0%')} times)",
        ),
        (
            "half of the blocks of 128 alive",
            f"{blocks(128, '50.0%')} times as fast as dense; with all alive {blocks(128, '100.0%')} times",
        ),
        (
            "evaluation without half of the channels of every group (`models.slim`)",
            "{VGG16} times faster (VGG16), {ResNet-56} times (ResNet-56, inner channels of the blocks), "
            "{LeNet-5} times (LeNet-5)".format(**slim),
        ),
        (
            "a GPT of width 256 without half of its hidden units and heads (`trace.slim`)",
            f"forward pass {smaller['NNX', 'forward']} (NNX) and {smaller[linen, 'forward']} times faster (Linen under "
            f"scan and remat), train step {smaller['NNX', 'train step']} and {smaller[linen, 'train step']} times",
        ),
        (
            "train step of an unchanged GPT by `trace.sparse_apply`, 10% of the blocks alive",
            "{} times faster (width 256, blocks of 64), {} times (width 1,024, blocks of 128)".format(
                *unchanged
            ),
        ),
    ]


def digest() -> str:
    """What is written of docs/benchmarks.md."""
    parts = {
        "**One update of a ResNet-50's 25.6 million parameters**, as a multiple of the dense optimizer's time where "
        "no unit is given:": updates(),
        "**Train steps:**": training(),
        "**Products and smaller models:**": products(),
    }
    return "\n\n".join(
        "\n".join(
            [f"{title}\n", "| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]
        )
        for title, rows in parts.items()
    )

"""The reference: what autodoc shows, where names of docstrings lead, and that every public name is there once."""

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from collections import defaultdict
from types import ModuleType

from sphinx.util import logging
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

# Modules whose public names the reference must have. Those of ``jaxsparse`` itself come first: a name that is public
# there is shown as jaxsparse.NAME, and as no other.
MODULES = (
    "jaxsparse",
    "jaxsparse.allocation",
    "jaxsparse.artifacts",
    "jaxsparse.artifacts.formats",
    "jaxsparse.counts",
    "jaxsparse.groups",
    "jaxsparse.inspect",
    "jaxsparse.kernels",
    "jaxsparse.masks",
    "jaxsparse.models",
    "jaxsparse.nn",
    "jaxsparse.parallel",
    "jaxsparse.post_training",
    "jaxsparse.saliency",
    "jaxsparse.schedules",
    "jaxsparse.selection",
    "jaxsparse.structures",
    "jaxsparse.trace",
    "jaxsparse.transforms",
    "jaxsparse.transforms.regrow",
)


def has_identity(value: object) -> bool:
    """Whether a value is one of a kind, as functions, classes and modules are and constants are not."""
    return inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)


@functools.cache
def public_names() -> dict[str, object]:
    """The names that the reference must have, each object once: full name -> object."""
    names, seen = {}, set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if has_identity(value) and id(value) in seen:
                continue
            seen.add(id(value))
            names[
                value.__name__ if isinstance(value, ModuleType) else f"{module_name}.{name}"
            ] = value
    return names


def value_of(name: str) -> object:
    """What a full name stands for; None if nothing."""
    module, _, rest = name.partition(".")
    value = importlib.import_module(module) if module == "jaxsparse" else None
    for part in rest.split("."):
        value = getattr(value, part, None)
    return value


def skip_member(app, what, name, obj, skip, options):
    """Leaves out the fields of NamedTuples, dataclasses and Flax modules, and in a module what jaxsparse itself has.

    Fields stand under "Attributes" in the docstring of their class.
    """
    del app, name, options
    if isinstance(obj, ModuleType) or any(
        obj is value for name, value in public_names().items() if is_top(name)
    ):
        return True
    if what == "class" and not isinstance(obj, property):
        return (
            not (
                inspect.isroutine(obj)
                and str(getattr(obj, "__module__", "")).startswith("jaxsparse")
            )
            or skip
        )
    return skip


def is_top(name: str) -> bool:
    """Whether a name is one of jaxsparse itself."""
    return name.count(".") == 1


def signature(app, what, name, obj, options, given, returns):
    """The signature as it stands in the source: ``ArrayLike`` rather than the union that it stands for."""
    del app, what, name, options, returns
    if given is None:
        return None
    if (
        inspect.isclass(obj)
        and dataclasses.is_dataclass(obj)
        and "__init__" not in inspect.getsource(obj)
    ):
        return fields_of(obj), None
    function = obj.__init__ if inspect.isclass(obj) and "__init__" in vars(obj) else obj
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    arguments = definition.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    shown = definition.returns is not None and not inspect.isclass(obj)
    return f"({ast.unparse(arguments)})", ast.unparse(definition.returns) if shown else None


def fields_of(cls: type) -> str:
    """The signature of a dataclass, with annotations and defaults as they stand in its source and that of its bases."""
    texts = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("jaxsparse"):
            for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body:
                if isinstance(node, ast.AnnAssign):
                    texts[node.target.id] = field_text(node)
    shown, by_name = [], False
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in texts:  # others are Flax's
            if parameter.kind is parameter.KEYWORD_ONLY and not by_name:
                shown, by_name = [*shown, "*"], True
            shown.append(texts[parameter.name])
    return f"({', '.join(shown)})"


def field_text(node: ast.AnnAssign) -> str:
    """A field as an argument."""
    default = node.value
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "dataclasses.field":
        options = {keyword.arg: keyword.value for keyword in default.keywords}
        default = options.get("default", options.get("default_factory"))
    text = f"{node.target.id}: {ast.unparse(node.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def resolve(app, env, node, contnode):
    """Where a name leads that a docstring gives by another of its modules, or without one."""
    del app
    if node.get("refdomain") != "py":
        return None
    objects, target = env.domains["py"].objects, node["reftarget"].lstrip(".~")
    if node.get("reftype") == "attr":  # fields stand with their class
        target = target.rpartition(".")[0]
    value = value_of(target) if target.startswith("jaxsparse.") else None
    if value is not None and has_identity(value):
        found = [name for name, public in public_names().items() if public is value]
    else:
        found = [
            name
            for name, entry in objects.items()
            if name.endswith(f".{target}") and not entry.aliased
        ]
    if target.startswith("jaxsparse.") and not found:
        return (
            contnode
            if value is not None and not target.split(".")[-1].startswith("_")
            else None
        )
    found = [name for name in found if is_top(name)] or found
    if len(found) != 1 or found[0] not in objects:
        return None
    entry = objects[found[0]]
    return make_refnode(
        env.app.builder,
        node.get("refdoc", env.docname),
        entry.docname,
        entry.node_id,
        contnode,
        found[0],
    )


def check_names(app, env):
    """Warns, which -W makes an error, of public names that the reference lacks or has twice."""
    del app
    found = {name for name, entry in env.domains["py"].objects.items() if not entry.aliased}
    for name in sorted(set(public_names()) - found):
        logger.warning("the reference lacks the public name %s", name)
    objects = defaultdict(list)
    for name in sorted(found):
        if has_identity(value := value_of(name)):
            objects[id(value)].append(name)
    for names in objects.values():
        if len(names) > 1:
            logger.warning("the reference has one object more than once: %s", ", ".join(names))


def setup(app):
    """Connects all of these."""
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", check_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

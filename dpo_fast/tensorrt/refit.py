"""New weights for a plan: the same graph with other weights needs no new build."""

from pathlib import Path
from types import ModuleType

from dpo_fast.errors import BuildError
from dpo_fast.files import write_bytes
from dpo_fast.tensorrt.package import message_log, parser_errors, read_plan


def refit_plan(package: ModuleType, plan: Path, graph: Path, target: Path, *, host_code: bool = False) -> None:
    """Write a plan anew with the weights of a graph.

    Args:
        package: `tensorrt` or `tensorrt_rtx`.
        plan: built with refitting allowed, on a machine like this one.
        graph: the .onnx file, with the initializers' names of the one that the plan was built from; its external data
            lie beside it.
        target: what is written; may be the plan itself. It is there whole, or not at all.
        host_code: as `read_plan`.

    Raises:
        BuildError: the plan or the graph cannot be read, the plan takes no new weights, or the graph lacks some.
        StorageError: the disk refused.
    """
    log = message_log(package)
    engine = read_plan(package, log, plan, BuildError, host_code=host_code)
    if not engine.refittable:
        raise BuildError(f"{plan}: takes no new weights; build it again with a recipe that says refittable")
    try:
        refitter = package.Refitter(engine, log)
        parser = package.OnnxParserRefitter(refitter, log)
    except TypeError as error:  # what the bindings raise where the library makes nothing
        raise BuildError(f"{plan}: cannot be refitted{log.last()}; build it again with `dpo-fast build`") from error
    if not parser.refit_from_file(str(graph)):
        raise BuildError(
            f"{graph}: its weights do not go into {plan.name} ({parser_errors(parser)}{log.last()}); "
            "build the plans again with `dpo-fast build`"
        )
    missing = refitter.get_missing_weights()
    if missing:
        raise BuildError(
            f"{graph}: lacks {len(missing)} weights that {plan.name} wants, such as {missing[0]!r}; "
            "refit with a checkpoint of the same architecture"
        )
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{plan}: refused the weights of {graph}{log.last()}; build it again with `dpo-fast build`")
    serialized = engine.serialize()
    if serialized is None:
        raise BuildError(f"{plan}: cannot be written anew{log.last()}; build it again with `dpo-fast build`")
    write_bytes(target, serialized)

"""A bundle's engines, loaded when they are wanted and let go of when they are not."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dpo_fast.bundle import Bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine


class Engines:
    """The engines of a bundle's roles; roles of one graph, an adapter's and its base's, share its weights."""

    def __init__(self, bundle: Bundle, open_one: Callable[[Bundle, str], Engine] = open_engine) -> None:
        """No engine is loaded yet.

        Args:
            bundle: whose graphs are loaded.
            open_one: loads a role's engine.
        """
        self._bundle, self._open_one = bundle, open_one
        self._threads = ThreadPoolExecutor(2, "load")
        self._loading: dict[str, tuple[str, Future[Engine]]] = {}  # by graph: whose it was first

    def load(self, role: str) -> None:
        """Begin to load a role's engine in the background, if nobody has yet; loading releases the interpreter."""
        graph = self._bundle.manifest.models[role].engine_graph
        if graph not in self._loading:
            self._loading[graph] = role, self._threads.submit(self._open_one, self._bundle, role)

    def get(self, role: str) -> Engine:
        """A role's engine, as soon as it is loaded.

        Raises:
            BundleError: it cannot be loaded.
            MissingDependencyError: the engine's package is not installed.
        """
        self.load(role)
        model = self._bundle.manifest.models[role]
        first, loading = self._loading[model.engine_graph]
        engine = loading.result()
        return engine if role == first else engine.with_gates(model.adapter_gates or ())

    def release(self) -> None:
        """Let go of all engines; their memory is free when nobody else holds them."""
        self._loading.clear()

    def close(self) -> None:
        """Release the engines, and wait for what is being loaded."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.release()

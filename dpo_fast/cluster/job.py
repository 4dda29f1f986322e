"""What a worker has to know: plain values that travel to another process or machine."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.bundle import MANIFEST, POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.cluster.in_hand import ScoresInHand
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError
from dpo_fast.files import sha256
from dpo_fast.scoring import Work
from dpo_fast.store import ScoreStore
from dpo_fast.token_cache import TokenCache, TokenSource


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be scored, and with what.

    Attributes:
        bundle: its folder, under the same path on every machine.
        bundle_sha256: of its manifest, which has the hashes of all the rest.
        tokens: of the preference set.
        store: of the run's parts.
        parts: their numbers, and the rows of each, counted from 0.
        roles: whose scores the parts hold.
        token_budget: of a batch, in tokens.
        max_length: of prompt and completion together, in tokens.
        reference_scores: a run whose reference scores are taken, or None.
        threads: of an engine's operators; 0 takes every physical core.
        recipe_engine: the engine that the bundle's recipe names.
        environment: variables that decide where the caches lie, as the driver has them.
        engine: opens a role's engine; None: the recipe's.
    """

    bundle: Path
    bundle_sha256: str
    tokens: TokenSource
    store: ScoreStore
    parts: Mapping[int, tuple[int, int]]
    roles: tuple[str, ...]
    token_budget: int
    max_length: int
    reference_scores: Path | None
    threads: int
    recipe_engine: str
    environment: Mapping[str, str]
    engine: Callable[[Bundle, str], Engine] | None = None

    @property
    def computed(self) -> tuple[str, ...]:
        """Roles whose scores engines compute; the reference's may be taken from another run."""
        return tuple(role for role in self.roles if role != REFERENCE or self.reference_scores is None)

    def open_bundle(self) -> Bundle:
        """The bundle, as this machine has it; the first thing to be done there.

        Raises:
            BundleError: it is not there, or another one is.
        """
        os.environ.update(self.environment)
        if self.threads:  # of the tokenizer too, or the workers of a machine would be in each other's way
            os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        where = "put the bundle on a folder that all nodes share, or copy it to the same path on each"
        manifest = self.bundle / MANIFEST
        if not manifest.is_file():
            raise BundleError(f"{self.bundle}: is not there; {where}")
        if sha256(manifest) != self.bundle_sha256:
            raise BundleError(f"{self.bundle}: is another bundle than on the driver's machine; {where}")
        return open_bundle(self.bundle)

    def open_engine(self, bundle: Bundle, role: str) -> Engine:
        """Load a role's engine; see `dpo_fast.engines.open_engine`."""
        if self.engine is not None:
            return self.engine(bundle, role)
        return open_engine(bundle, role, threads=self.threads)

    def open(self, bundle: Bundle, tokens: TokenCache, engine: Engine, references: ScoresInHand) -> Work:
        """What `dpo_fast.scoring` wants, opened on this machine.

        Args:
            bundle: from `open_bundle`.
            tokens: of `self.tokens`, on this machine.
            engine: that scores first; all roles' have its name and precision.
            references: where reference scores are found and kept.
        """
        return Work(
            bundle=bundle,
            tokens=tokens,
            store=self.store,
            parts=self.parts,
            roles=self.roles,
            token_budget=self.token_budget,
            max_length=self.max_length,
            known=references,
            cache=references,
            engine_name=engine.name,
            precision=engine.precision,
        )

    def stages(self, *, apart: bool) -> list["Stage"]:
        """What is done to each part, one stage after another.

        Args:
            apart: whether policy and reference lie in workers of their own.
        """
        if not apart:
            return [Stage(0, to_score=self.roles, to_load=self.computed, share=1.0, is_last=True)]
        return [
            Stage(0, to_score=(REFERENCE,), to_load=(REFERENCE,), share=0.5, is_last=False),
            # The reference's scores come from the stage before; what is missing all the same is scored here.
            Stage(1, to_score=self.roles, to_load=(POLICY,), share=0.5, is_last=True),
        ]


@dataclass(frozen=True, slots=True)
class Stage:
    """What one kind of workers does to each part.

    Attributes:
        number: of the stage, from 0.
        to_score: roles whose scores it computes where they are missing; the part is written where these are all.
        to_load: roles whose engines its workers load at the start.
        share: of the whole work, for the progress.
        is_last: whether it writes the part.
    """

    number: int
    to_score: tuple[str, ...]
    to_load: tuple[str, ...]
    share: float
    is_last: bool

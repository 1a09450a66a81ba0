"""Proposers: which sequence to try next.

A proposal is a function of the seed, of the trials done and running, and of the new trial's number, so that a resumed
search proposes what the uninterrupted one would have. No sequence is ever proposed twice, not even a failed one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.region import Region
from composer_search.space import Space
from composer_search.study import StudySettings, Trial

if TYPE_CHECKING:
    from ax.adapter.torch import TorchAdapter
    from ax.api.client import Client
    from ax.core.generator_run import GeneratorRun

_SCORE = "score"


@dataclass(frozen=True)
class Proposal:
    """A sequence to try.

    Attributes:
        trial: The new trial's number.
        sequence: The sequence.
        proposer: Who chose it: ``sobol``, ``bayesian``, ``exhaustive``, ``random``, ``evolution`` or ``listed``.
        note: What went wrong where another proposer had to step in.
    """

    trial: int
    sequence: CompositeSequence
    proposer: str
    note: str | None = None


class Proposer(Protocol):
    """Chooses sequences of a space."""

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """Choose the sequence of trial `number`; None when no sequence is left.

        Args:
            trials: Those done, failed ones included, in any order.
            running: Those proposed and not done.
            number: The new trial's number.
        """
        ...

    def snapshot(self, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """The state after `trials` as JSON values, if there is one worth keeping."""
        ...


def make_proposer(settings: StudySettings) -> Proposer:
    """The proposer that the settings name.

    Ax models accuracy and knows nothing of exact costs and constraints; where there are any, BoTorch is used directly.

    Raises:
        UsageError: If there is no such proposer, or it cannot do the task, or the constraints leave nothing to propose.
        ComposerError: If a package that it needs is missing.
    """
    if settings.budget < 1:
        raise UsageError(f"budget={settings.budget}; expected at least 1 trial")
    if settings.batch < 1:
        raise UsageError(f"batch={settings.batch}; expected at least 1 trial")
    settings.criteria.check(settings.space)
    region = Region(settings.space, settings.criteria)
    if settings.proposer == "listed":
        return ListedProposer.of(region, settings.only)
    if settings.proposer == "random":
        return RandomProposer(region, settings.seed)
    if settings.proposer == "exhaustive":
        if settings.budget < region.size:
            size = f"all {region.size:,} sequences of {settings.space.length} blocks"
            raise UsageError(f"budget={settings.budget} is too small for an exhaustive search of {size}; raise it")
        return ExhaustiveProposer(region, settings.seed)
    if settings.proposer == "evolution":
        from composer_search.evolution import EvolutionProposer

        return EvolutionProposer(region, settings.seed, settings.initial)
    if settings.proposer == "bayesian":
        require_search_packages("ax" if settings.criteria.plain else "botorch")
        if settings.criteria.plain:
            return BayesianProposer(settings.space, settings.seed, settings.initial)
        from composer_search.botorch_proposer import BotorchProposer

        return BotorchProposer(region, settings.seed, settings.initial)
    raise UsageError(
        f"unknown proposer {settings.proposer!r}; expected bayesian, exhaustive, random, evolution or listed"
    )


def require_search_packages(*names: str) -> None:
    """Raise a `ComposerError` that says what to install where one of Ax and BoTorch that is needed is missing."""
    if any(importlib.util.find_spec(name) is None for name in names or ("ax", "botorch")):
        raise ComposerError('a Bayesian search needs Ax and BoTorch: pip install "composer-megatron[search]"')


def propose_batch(
    proposer: Proposer, trials: Sequence[Trial], running: Sequence[Proposal], numbers: Sequence[int]
) -> list[Proposal]:
    """Choose sequences for several trials at once, each in the knowledge of the others; fewer when none are left."""
    batch: list[Proposal] = []
    for number in numbers:
        proposal = proposer.propose(trials, [*running, *batch], number)
        if proposal is None:
            break
        batch.append(proposal)
    return batch


def tried_sequences(trials: Sequence[Trial], running: Sequence[Proposal]) -> set[CompositeSequence]:
    """The sequences that must not be proposed again."""
    return {trial.sequence for trial in trials} | {proposal.sequence for proposal in running}


@dataclass(frozen=True)
class RandomProposer:
    """Uniform over the sequences of the region that were not tried yet."""

    region: Region
    seed: int

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """Draw one; of a space too large to enumerate under constraints, by trying at random."""
        rng = random.Random(f"{self.seed}/{number}")
        sequence = self.region.draw(tried_sequences(trials, running), rng)
        return None if sequence is None else Proposal(number, sequence, "random")

    def snapshot(self, trials: Sequence[Trial]) -> None:
        """There is no state."""


@dataclass(frozen=True)
class ExhaustiveProposer:
    """Every sequence of the region once, in an order shuffled by the seed, so that a part of it is a fair sample."""

    region: Region
    seed: int

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """The first sequence of that order that has not been tried."""
        space = self.region.space
        order = random.Random(self.seed).sample(range(space.size), space.size)
        tried = {space.rank(sequence) for sequence in tried_sequences(trials, running)}
        left = (rank for rank in order if rank not in tried and self.region.allows(space.at(rank)))
        rank = next(left, None)
        return None if rank is None else Proposal(number, space.at(rank), "exhaustive")

    def snapshot(self, trials: Sequence[Trial]) -> None:
        """There is no state."""


@dataclass(frozen=True)
class ListedProposer:
    """The sequences of a list, in its order: known designs, to be scored as a search scores its candidates."""

    sequences: tuple[CompositeSequence, ...]

    @classmethod
    def of(cls, region: Region, sequences: Sequence[CompositeSequence]) -> ListedProposer:
        """The proposer of these sequences.

        Raises:
            UsageError: If the list is empty, or a sequence is not of the space or breaks a constraint.
        """
        if not sequences:
            raise UsageError("a list of no sequences; give at least one")
        for sequence in sequences:
            if sequence not in region.space:
                raise UsageError(f"{sequence} is not of {region.space}; all of a list have the length of the search")
            if not region.allows(sequence):
                raise UsageError(f"{sequence} breaks a constraint; leave it out, or the constraint")
        return cls(tuple(sequences))

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """The sequence of that number."""
        return Proposal(number, self.sequences[number], "listed") if number < len(self.sequences) else None

    def snapshot(self, trials: Sequence[Trial]) -> None:
        """There is no state."""


class BayesianProposer:
    """Bayesian optimisation through Ax: scrambled Sobol points first, then a Gaussian process.

    The process is BoTorch's `SingleTaskGP`: an RBF kernel with a length scale for each position (ARD) and a
    dimension-scaled log-normal prior, noise inferred from the scores. The acquisition is log noisy expected improvement
    (qLogNEI) with the running trials pending; where a space has more than 10,000 sequences, or three primitives, it is
    climbed letter by letter (`composer_search.climbing`). The process is a function of the trials alone, so that the
    proposals of a batch share one fit; the acquisition's random numbers are the trial's own. Where Ax has no answer, as
    when the space is all but exhausted, a random untried sequence stands in and the proposal's note says why.

    Args:
        space: What is searched.
        seed: Of the Sobol sequence and of the acquisition's optimiser.
        initial: Trials before the process takes over.

    Raises:
        UsageError: If `initial` is below 1.
    """

    def __init__(self, space: Space, seed: int, initial: int) -> None:
        if initial < 1:
            raise UsageError(f"initial={initial}; expected at least 1 trial before the Bayesian ones")
        self.space, self.seed, self.initial = space, seed, initial
        self._fitted: tuple[list[tuple[int, CompositeSequence, float | None]], TorchAdapter] | None = None

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """Ask Ax, and a random proposer where Ax has no answer."""
        fallback = RandomProposer(Region(self.space), self.seed).propose(trials, running, number)
        if fallback is None:
            return None
        tried = tried_sequences(trials, running)
        by = "sobol" if len(trials) + len(running) < self.initial else "bayesian"
        with quiet_single_thread():
            try:
                if by == "sobol":
                    sequence = self._sobol_point(tried, number)
                else:
                    sequence = self._best_candidate(trials, running, number)
            except Exception as error:  # Ax, BoTorch and GPyTorch raise many kinds; a search of hours must go on
                return Proposal(number, fallback.sequence, "random", f"Ax: {type(error).__name__}: {error}")
        if sequence in tried:
            return Proposal(number, fallback.sequence, "random", f"Ax proposed {sequence} again")
        return Proposal(number, sequence, by)

    def snapshot(self, trials: Sequence[Trial]) -> Mapping[str, Any]:
        """The Ax client's snapshot after `trials`, as `ax.api.client.Client.load_from_json_file` reads it."""
        with quiet_single_thread():
            snapshot: Mapping[str, Any] = self._client(trials)._to_json_snapshot()
        return snapshot

    def _sobol_point(self, tried: set[CompositeSequence], number: int) -> CompositeSequence:
        """The point at the trial's own place in the sequence, or the first untried one of the five from there on."""
        from ax.adapter.registry import Generators

        adapter = Generators.SOBOL(experiment=self._client(())._experiment, seed=self.seed, init_position=number)
        for _ in range(5):
            sequence = self._sequence(adapter.gen(n=1))
            if sequence not in tried:
                break
        return sequence

    def _best_candidate(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> CompositeSequence:
        """The untried sequence of the highest acquisition, as far as Ax finds it."""
        return self._sequence(self._generate(self._adapter(trials), trials, running, number))

    def _generate(
        self, adapter: TorchAdapter, trials: Sequence[Trial], running: Sequence[Proposal], number: int
    ) -> GeneratorRun:
        """One candidate of the process, in the knowledge of what runs."""
        from ax.core.observation import ObservationFeatures
        from ax.utils.common.random import with_rng_seed

        failed = [trial.sequence for trial in _in_order(trials) if not trial.completed]  # not wanted again either
        pending = [*failed, *(proposal.sequence for proposal in running)]
        features = [ObservationFeatures(parameters=self._parameters(sequence)) for sequence in pending]
        with with_rng_seed(random.Random(f"{self.seed}/{number}").randrange(2**31)):
            return adapter.gen(n=1, pending_observations={_SCORE: features} if features else None)

    def _adapter(self, trials: Sequence[Trial]) -> TorchAdapter:
        """The process fitted to the trials: once for all proposals of a batch."""
        from ax.adapter.registry import Generators
        from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
        from ax.generators.torch.botorch_modular.utils import ModelConfig
        from ax.utils.common.random import with_rng_seed
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.models import SingleTaskGP

        from composer_search.climbing import ClimbingAcquisition

        key = [(trial.trial, trial.sequence, trial.score) for trial in _in_order(trials)]
        if self._fitted is None or self._fitted[0] != key:
            # The kernel is left to SingleTaskGP: naming RBFKernel would build one without ARD and without the prior.
            # Ax turns two letters into 0 and 1, and more into one-hot vectors, which puts none between two others.
            surrogate = SurrogateSpec(model_configs=[ModelConfig(botorch_model_class=SingleTaskGP)])
            with with_rng_seed(self.seed):  # a fit that fails is tried again from random parameters
                adapter = Generators.BOTORCH_MODULAR(
                    experiment=self._client(trials)._experiment,
                    surrogate_spec=surrogate,
                    acquisition_class=ClimbingAcquisition,
                    botorch_acqf_class=qLogNoisyExpectedImprovement,
                )
            self._fitted = key, adapter
        return self._fitted[1]

    def _client(self, trials: Sequence[Trial]) -> Client:
        """An Ax client that knows the trials, in the order of their numbers whatever order they ended in."""
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig

        client = Client(random_seed=self.seed)
        choices = list(self.space.primitives)
        parameters = [
            ChoiceParameterConfig(name=name, values=choices, parameter_type="str", is_ordered=False)
            for name in self._positions
        ]
        client.configure_experiment(name="composer-search", parameters=parameters)
        client.configure_optimization(objective=_SCORE)
        scores: dict[int, float] = {}
        for trial in _in_order(trials):
            index = client.attach_trial(self._parameters(trial.sequence))
            if trial.score is None:
                client.mark_trial_abandoned(index)  # Ax proposes the points of trials marked as failed again
            else:
                scores[index] = trial.score
        _complete(client, scores)
        return client

    @property
    def _positions(self) -> list[str]:
        return [f"block_{position}" for position in range(self.space.free)]

    def _parameters(self, sequence: CompositeSequence) -> dict[str, str | int | float | bool]:
        return dict(zip(self._positions, self.space.free_letters(sequence), strict=True))

    def _sequence(self, run: GeneratorRun) -> CompositeSequence:
        parameters = run.arms[0].parameters
        return self.space.join("".join(str(parameters[name]) for name in self._positions))


def _in_order(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.trial)


def _complete(client: Client, scores: Mapping[int, float]) -> None:
    """Complete trials with their scores, all at once: `Client.complete_trial` looks at all data for each anew."""
    if not scores:
        return
    from ax.core.data import Data

    pandas: Any = importlib.import_module("pandas")
    experiment = client._experiment
    arms = {index: arm.name for index in scores for arm in experiment.trials[index].arms}
    rows = [
        {"trial_index": index, "arm_name": arms[index], "metric_name": _SCORE, "metric_signature": _SCORE}
        | {"mean": score, "sem": float("nan")}
        for index, score in scores.items()
    ]
    experiment.attach_data(Data(df=pandas.DataFrame(rows)))
    for index in scores:
        experiment.trials[index].mark_completed()


@contextlib.contextmanager
def quiet_single_thread() -> Iterator[None]:
    """One torch thread, since Ax is many times slower where threads compete for the cores, and no chatter of Ax."""
    import torch

    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(disabled)

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
    from ax.api.client import Client

_SCORE = "score"

_SNAPSHOT_EVERY = 16
"""Proposals from one snapshot to the next: writing one takes longer than a proposal, and nothing is read from it."""


@dataclass(frozen=True)
class Proposal:
    """A sequence to try.

    Attributes:
        trial: The new trial's number.
        sequence: The sequence.
        proposer: Who chose it: ``sobol``, ``bayesian``, ``exhaustive``, ``random``, ``evolution`` or ``listed``.
        note: What went wrong where another proposer had to step in.
        snapshot: The state that it was computed from, for the study's `ax.json`; of some proposals.
    """

    trial: int
    sequence: CompositeSequence
    proposer: str
    note: str | None = None
    snapshot: Mapping[str, Any] | None = None


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
    (qLogNEI) with the running trials pending. A new Ax client is built from the trials each time and seeded by the
    trial's number. Where Ax has no answer, as when the space is all but exhausted, a random untried sequence stands in
    and the proposal's note says why.

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

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """Ask Ax, and a random proposer where Ax has no answer."""
        fallback = RandomProposer(Region(self.space), self.seed).propose(trials, running, number)
        if fallback is None:
            return None
        tried = tried_sequences(trials, running)
        with quiet_single_thread():
            client = self._client(trials, running, number)
            try:
                sequence = self._ask(client)
            except Exception as error:  # Ax, BoTorch and GPyTorch raise many kinds; a search of hours must go on
                return Proposal(number, fallback.sequence, "random", f"Ax: {type(error).__name__}: {error}")
            snapshot = client._to_json_snapshot() if number % _SNAPSHOT_EVERY == 0 else None
        if sequence in tried:
            return Proposal(number, fallback.sequence, "random", f"Ax proposed {sequence} again")
        by = "sobol" if len(trials) + len(running) < self.initial else "bayesian"
        return Proposal(number, sequence, by, snapshot=snapshot)

    def snapshot(self, trials: Sequence[Trial]) -> Mapping[str, Any]:
        """The Ax client's snapshot after `trials`, as `ax.api.client.Client.load_from_json_file` reads it."""
        with quiet_single_thread():
            snapshot: Mapping[str, Any] = self._client(trials, (), len(trials))._to_json_snapshot()
        return snapshot

    def _ask(self, client: Client) -> CompositeSequence:
        (parameters,) = client.get_next_trials(max_trials=1).values()
        return self.space.join("".join(str(parameters[name]) for name in self._positions))

    @property
    def _positions(self) -> list[str]:
        return [f"block_{position}" for position in range(self.space.free)]

    def _parameters(self, sequence: CompositeSequence) -> dict[str, str | int | float | bool]:
        return dict(zip(self._positions, self.space.free_letters(sequence), strict=True))

    def _client(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Client:
        """An Ax client that knows the trials, in the order of their numbers whatever order they ended in."""
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig

        client = Client(random_seed=random.Random(f"{self.seed}/{number}").randrange(2**31))
        choices = list(self.space.primitives)
        parameters = [
            ChoiceParameterConfig(name=name, values=choices, parameter_type="str", is_ordered=False)
            for name in self._positions
        ]
        client.configure_experiment(name="composer-search", parameters=parameters)
        client.configure_optimization(objective=_SCORE)
        scores: dict[int, float] = {}
        for trial in sorted(trials, key=lambda trial: trial.trial):
            index = client.attach_trial(self._parameters(trial.sequence))
            if trial.score is None:
                client.mark_trial_abandoned(index)  # Ax proposes the points of trials marked as failed again
            else:
                scores[index] = trial.score
        _complete(client, scores)
        for proposal in running:
            client.attach_trial(self._parameters(proposal.sequence))
        client.set_generation_strategy(self._strategy(number))
        return client

    def _strategy(self, number: int) -> Any:
        """Sobol from the trial's own place in the sequence, and the Gaussian process after `initial` trials."""
        from ax.adapter.registry import Generators
        from ax.generation_strategy.generation_node import GenerationNode
        from ax.generation_strategy.generation_strategy import GenerationStrategy
        from ax.generation_strategy.generator_spec import GeneratorSpec
        from ax.generation_strategy.transition_criterion import MinTrials
        from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
        from ax.generators.torch.botorch_modular.utils import ModelConfig
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.models import SingleTaskGP

        # The kernel is left to SingleTaskGP: naming RBFKernel here would build one without ARD and without the prior.
        # Ax turns two letters into 0 and 1, and more into one-hot vectors, which puts none between two others.
        surrogate = SurrogateSpec(model_configs=[ModelConfig(botorch_model_class=SingleTaskGP)])
        process = {"surrogate_spec": surrogate, "botorch_acqf_class": qLogNoisyExpectedImprovement}
        sobol = {"seed": self.seed, "init_position": number}
        handover = MinTrials(threshold=self.initial, transition_to="bayesian", use_all_trials_in_exp=True)
        nodes = [
            GenerationNode(
                name="sobol",
                generator_specs=[GeneratorSpec(Generators.SOBOL, generator_kwargs=sobol)],
                transition_criteria=[handover],
                should_deduplicate=True,
            ),
            GenerationNode(
                name="bayesian",
                generator_specs=[GeneratorSpec(Generators.BOTORCH_MODULAR, generator_kwargs=process)],
                should_deduplicate=True,
            ),
        ]
        return GenerationStrategy(name="sobol-then-bayesian", nodes=nodes)


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

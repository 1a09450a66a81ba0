"""The report on models: their sequences, what they cost, how they trained and what they write."""

from __future__ import annotations

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_search.report.charts import MOST_POINTS, block_strip, loss_chart, loss_legend, primitive_legend
from composer_search.report.data import Contents, TrainingRun, is_baseline
from composer_search.report.markup import (
    Column,
    Markup,
    Missing,
    decimal,
    details,
    element,
    integer,
    join,
    phrase,
    sequence_text,
    table,
)


def sequences(contents: Contents) -> Markup | Missing:
    """Found, aggregated and extrapolated sequences as bars beside the baselines."""
    rows: list[tuple[str, str, CompositeSequence]] = []
    if contents.study and contents.study.scored:
        best = contents.study.scored[0][0]
        rows.append(("Found", f"best trial, number {best.number}", best.sequence))
    if contents.study and contents.study.aggregate:
        voters = len(contents.study.aggregate.members)
        rows.append(("Aggregated", f"vote of {voters}", contents.study.aggregate.sequence))
    for name, architecture in contents.models.items():
        rows.append((name, f"{_origin(architecture)}, shape {architecture.shape.name}", architecture.sequence))
    if not rows:
        return Missing("no study and no architecture was given")
    longest = max(len(sequence) for _, _, sequence in rows)
    bars = [_bar(name, note, sequence, longest) for name, note, sequence in rows]
    caption = element("figcaption", "One cell per block, first block on the left; all bars at one scale.")
    return element("figure", primitive_legend(), *bars, caption)


def _bar(name: str, note: str, sequence: CompositeSequence, longest: int) -> Markup:
    counts = " + ".join(f"{count} {symbol}" for symbol, count in sequence.counts.items())
    head = element("span", element("strong", name), " ", element("span", note, class_="note"), class_="bar-name")
    text = sequence_text(sequence.notation)
    size = element("span", f"{counts} = {len(sequence)} blocks", class_="note")
    words = element("p", head, element("span", text, " ", size, class_="bar-size"), class_="bar-head")
    return element("div", words, block_strip(sequence.letters, longest), class_="bar")


def _origin(architecture: Architecture) -> str:
    origin = architecture.origin
    if is_baseline(architecture):
        return "attention and MLP in turn"
    if {"method", "from", "scale"} <= origin.keys():
        return f"{origin['method']} of {origin['from']} at scale {origin['scale']}"
    return ", ".join(f"{key} {value}" for key, value in origin.items()) or "origin not recorded"


def costs(contents: Contents) -> Markup | Missing:
    """Exact parameters, FLOPs and KV-cache bytes of every architecture, with the ratios to its baseline."""
    found = contents.models
    if not found:
        return Missing("no architecture was given")
    columns = [Column("Model"), Column("Blocks", numeric=True), Column("Parameters without embeddings", numeric=True)]
    columns += [Column("Parameters in all", numeric=True), Column("Training FLOPs per token", numeric=True)]
    columns += [Column("KV-cache bytes per token", numeric=True)]
    rows = [_cost_row(name, architecture, contents.seq_len) for name, architecture in found.items()]
    shapes = dict.fromkeys(architecture.shape for architecture in found.values())
    notes = [
        f"Shape {shape.name}: hidden {shape.hidden_size:,}, feed-forward {shape.ffn_hidden_size:,}, "
        f"{shape.num_attention_heads} heads and {shape.num_query_groups} KV groups of {shape.head_dim}, vocabulary "
        f"{shape.vocab_size:,}, {'tied' if shape.tied_embeddings else 'untied'} embeddings."
        for shape in shapes
    ]
    caption = (
        "Counted, not measured. FLOPs: forward and backward of the matrices, output layer included, and of causal "
        f"attention over {contents.seq_len:,} tokens; norms, activations and softmax are not counted. KV cache in "
        "bf16. Below the counts: how much bigger than the Llama baseline of the same shape, and the baseline's FLOPs "
        "and cache over the model's. Trained on equally many tokens, the bigger model has the advantage."
    )
    note = element("p", caption, class_="note")
    return phrase(table("Costs", columns, rows), note, *(element("p", words, class_="note") for words in notes))


def _cost_row(name: str, architecture: Architecture, seq_len: int) -> list[str]:
    counts, of_baseline = architecture.summary(seq_len), architecture.baseline().summary(seq_len)
    small = {
        "params_non_embedding": _excess(counts["params_non_embedding"], of_baseline["params_non_embedding"]),
        "params_total": _excess(counts["params_total"], of_baseline["params_total"]),
        "flops_per_token": _ratio(counts["flops_ratio"]),
        "kv_bytes_per_token": _ratio(counts["kv_ratio"]),
    }
    if is_baseline(architecture):
        small = dict.fromkeys(small, Markup("baseline"))
    cells = [phrase(integer(counts[key]), element("small", words)) for key, words in small.items()]
    kinds = element("small", " + ".join(f"{count} {symbol}" for symbol, count in architecture.sequence.counts.items()))
    text = element("small", architecture.sequence.notation, class_="sequence")
    return [phrase(name, text), phrase(integer(counts["blocks"]), kinds), *cells]


def _excess(of_this: int, of_baseline: int) -> Markup:
    return phrase(_signed(100 * (of_this / of_baseline - 1), 2), " %")


def _ratio(value: float | None) -> Markup:
    return Markup("no cache") if value is None else phrase("baseline ÷ this: ", decimal(value, 3))


def _signed(value: float, digits: int) -> Markup:
    sign = "+" if value > 0 else ""
    return phrase(sign, decimal(value, digits))


def training(contents: Contents) -> Markup | Missing:
    """Loss curves of the runs, their final held-out loss, and the differences between them."""
    if not contents.runs:
        return Missing("no training run was given")
    parts = []
    if any(run.training or run.validation for run in contents.runs):
        figcaption = element("figcaption", _curves_caption(contents))
        parts.append(element("figure", loss_legend(contents), loss_chart(contents), figcaption))
        parts.append(_validation_table(contents))
    else:
        parts.append(element("p", "No loss has been logged yet.", class_="note"))
    parts.append(element("h3", "Held-out loss of the trained models"))
    parts.append(_evaluation_table(contents))
    parts.append(element("p", _evaluation_caption(contents), class_="note"))
    return join(parts)


def _curves_caption(contents: Contents) -> str:
    words = "Training loss is that of each logged step's own batch"
    if any(len(run.training) > MOST_POINTS for run in contents.runs):
        words += f", drawn as means over neighbouring steps where there are more than {MOST_POINTS}"
    words += "; validation loss is on held-out text. Each curve is one run with one seed."
    dropped = sum(run.dropped for run in contents.runs)
    return words + (f" {dropped} logged losses were no finite number and are not drawn." if dropped else "")


def _validation_table(contents: Contents) -> Markup:
    runs = [run for run in contents.runs if run.validation]
    if not runs:
        return Markup()
    curves = [dict(run.validation) for run in runs]
    steps = sorted(set().union(*curves))
    rows = [[integer(step), *(decimal(c[step], 4) if step in c else "–" for c in curves)] for step in steps]
    columns = [Column("Step", numeric=True), *(Column(run.name, numeric=True) for run in runs)]
    return details("Validation loss as a table", table("Validation loss, nats per token", columns, rows))


def _evaluation_table(contents: Contents) -> Markup:
    losses = [run.evaluation["bits_per_byte"] for run in contents.runs if run.evaluation]
    most = max([*losses, *([contents.unigram[1]] if contents.unigram else [])], default=1.0)
    columns = [Column("Model"), Column("Bits per byte", numeric=True), Column("", meaning="bits per byte as a bar")]
    columns += [Column("Nats per token", numeric=True), Column("Perplexity", numeric=True)]
    columns += [Column("Steps", numeric=True), Column("Held-out tokens", True), Column("Held-out bytes", True)]
    rows = [_evaluation_row(run, index, most) for index, run in enumerate(contents.runs)]
    if contents.unigram and contents.text:
        (nats, bits), valid = contents.unigram, contents.text["valid"]
        counts = [integer(valid["tokens"]), integer(valid["bytes"])]
        bar = _bits_bar(bits, most, "unigram-bar")
        rows.append(["unigram model", decimal(bits, 4), bar, decimal(nats, 4), "–", "–", *counts])
    return table("Held-out loss", columns, rows)


def _evaluation_row(run: TrainingRun, index: int, most: float) -> list[str]:
    name = phrase(run.name, element("small", run.architecture.sequence.notation, class_="sequence"))
    if run.evaluation is None:
        return [name, "not evaluated", "", "–", "–", "–", "–", "–"]
    values = run.evaluation
    return [
        name,
        element("strong", decimal(values["bits_per_byte"], 4)),
        _bits_bar(values["bits_per_byte"], most, f"s{index % 6}"),
        decimal(values["nats_per_token"], 4),
        decimal(values["perplexity"], 2),
        *(integer(int(values[key])) for key in ("iteration", "tokens", "bytes")),
    ]


def _bits_bar(bits: float, most: float, style: str) -> Markup:
    share = 100 * bits / most if most > 0 else 0
    return element("span", class_=f"bits-bar {style}", style=f"width:{share:.2f}%", aria_hidden="true")


def _evaluation_caption(contents: Contents) -> Markup:
    parts: list[str] = ["Lower is better. "]
    evaluated = [(run, run.evaluation) for run in contents.runs if run.evaluation]
    baseline = next(((run, values) for run, values in evaluated if run.is_baseline), None)
    for run, values in evaluated:
        if baseline and not run.is_baseline and run.architecture.shape == baseline[0].architecture.shape:
            gap = values["bits_per_byte"] - baseline[1]["bits_per_byte"]
            excess = 100 * (run.architecture.params_total / baseline[0].architecture.params_total - 1)
            parts += [f"{run.name} minus {baseline[0].name}: ", _signed(gap, 4), " bits per byte, with "]
            parts += [_signed(excess, 2), " % parameters. "]
    if len(evaluated) > 1:
        parts.append("One seed each: how much another seed would change these figures was not measured. ")
    if len({(values["tokens"], values["bytes"]) for _, values in evaluated}) > 1:
        parts.append("The models were evaluated on different amounts of text, so the losses compare only roughly. ")
    if contents.unigram:
        parts.append("The unigram model knows only how frequent each token is in the training text.")
    return join(parts)


def samples(contents: Contents) -> Markup | Missing:
    """What each model wrote after each prompt, side by side."""
    if not any(run.samples for run in contents.runs):
        return Missing("no generated text was found" if contents.runs else "no training run was given")
    prompts = dict.fromkeys(prompt for run in contents.runs for prompt, _ in run.samples)
    groups = []
    for prompt in prompts:
        written = [(run.name, text) for run in contents.runs for asked, text in run.samples if asked == prompt]
        cards = [_sample(name, prompt, text) for name, text in written]
        groups.append(element("div", *cards, class_="samples"))
    note = "Prompt in bold, then the model's continuation. An illustration, not a measurement."
    return phrase(*groups, element("p", note, class_="note"))


def _sample(name: str, prompt: str, text: str) -> Markup:
    continuation = text.removeprefix(prompt)
    words = element("pre", element("b", prompt), continuation, tabindex=0)
    return element("figure", element("figcaption", name), words, class_="sample")


def plan(contents: Contents) -> Markup | Missing:
    """The pipeline stages."""
    values = contents.plan
    if values is None:
        return Missing("no plan was given")
    stages = values["stages"]  # one of which may hold the output layer alone
    blocks = [CompositeSequence.parse(stage["blocks"]) if stage["blocks"] else None for stage in stages]
    letters = ["" if each is None else each.letters for each in blocks]
    cuts = [sum(len(each) for each in letters[:number]) for number in range(1, len(letters))]
    sequence = CompositeSequence("".join(letters))
    columns = [Column("Stage", numeric=True), Column("Blocks"), Column("Training FLOPs per token", numeric=True)]
    columns += [Column("Parameters per rank", numeric=True), Column("State, bytes", numeric=True)]
    columns += [Column("Activations, bytes", numeric=True)]
    rows = [
        [
            integer(number),
            "none" if each is None else sequence_text(each.notation),
            *(integer(stage[key]) for key in ("flops_per_token", "params_per_rank", "state_bytes", "activation_bytes")),
        ]
        for number, (stage, each) in enumerate(zip(stages, blocks, strict=True), start=1)
    ]
    caption = f"{sequence.notation} in {len(stages)} stage{'s' * (len(stages) > 1)}. Computed, not measured"
    caption += "; the last stage bears the output layer."
    for key, words in (
        ("seq_len", "Sequence length"),
        ("micro_batch_size", "Micro-batch"),
        ("tensor_parallel", "Tensor-parallel ranks"),
        ("balance", "Mean over slowest stage as cut here"),
        ("balance_equal_split", "Mean over slowest stage with equal block counts"),
    ):
        if isinstance(values.get(key), int | float):
            caption += f" {words}: {values[key]:.4g}."
    bar = element("figure", block_strip(sequence.letters, len(sequence), cuts=cuts), element("figcaption", caption))
    return phrase(bar, table("Pipeline stages", columns, rows))

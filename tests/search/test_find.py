"""Costs, damage, `bitswitch.search`, genetic refinement."""

import copy
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch import search
from bitswitch.assignment import Assignment
from bitswitch.errors import UserError
from bitswitch.search import (
    Problem,
    Trace,
    cost_tables,
    damage_table,
    layer_costs,
    measured_damage,
    read_latency,
    refine,
    shared_inputs,
)

WIDTHS = (8, 4, 2)


class Block(nn.Module):
    """A stem, then two convolutions that read one tensor and are added, then one more, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.main = nn.Conv2d(4, 6, 3, padding=1)
        self.side = nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.after = nn.Conv2d(6, 3, 3, stride=2, bias=False)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm(self.main(x) + self.side(x)).relu()
        return self.head(self.after(x).mean((2, 3)))


X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"main": 4 * 6 * 9, "side": 4 * 6, "after": 6 * 3 * 9}
MACS = {"main": 4 * 6 * 9 * 64, "side": 4 * 6 * 64, "after": 6 * 3 * 9 * 9}
TRACES = {"main": Trace(3.0, 0.1), "side": Trace(1.0, 0.1), "after": Trace(2.0, 0.1), "stem": Trace(99.0, 1.0)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return bs.quantize(Block(), bits=WIDTHS, example_inputs=X)


def all_choices():
    return [dict(zip(WEIGHTS, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=3)]


def test_costs_against_figures_by_hand(model, tmp_path):
    tables = cost_tables(model, (X,), {name: {w: 0.5 * w for w in WIDTHS} for name in WEIGHTS})
    assert list(tables) == ["bits", "weight_bits", "bytes", "bitops", "latency"]
    total = sum(WEIGHTS.values())
    bs.save(model, tmp_path / "m.safetensors")
    for widths in all_choices():
        cost = {name: sum(table[layer][w] for layer, w in widths.items()) for name, table in tables.items()}
        assert cost["bits"] == pytest.approx(sum(widths.values()) / 3)
        assert cost["weight_bits"] == pytest.approx(sum(w * WEIGHTS[n] for n, w in widths.items()) / total)
        assert cost["bitops"] == sum(MACS[n] * w * w for n, w in widths.items())
        assert cost["latency"] == pytest.approx(0.5 * sum(widths.values()))
        rest = cost["bytes"] - sum(math.ceil(WEIGHTS[n] * w / 8) for n, w in widths.items())
        # Every other number of the model, four bytes each, whatever the widths.
        others = sum(t.numel() for t in model.state_dict().values()) - total
        assert rest == 4 * others
    assert "bitops" not in cost_tables(model) and "latency" not in cost_tables(model)


def test_a_small_layer_is_padded_to_a_byte():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False), nn.Linear(1, 2))
    model = bs.quantize(net, bits=(8, 2), example_inputs=torch.randn(4, 3))
    table = cost_tables(model)["bytes"]["1"]
    assert table[8] - table[2] == 3 - 1


def test_damage_against_the_formula(model):
    table = damage_table(model, TRACES)
    for name in WEIGHTS:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().double()
        for width in WIDTHS:
            error = float((layer.weight_at(width).detach().double() - weight).square().sum())
            assert table[name][width] == pytest.approx(TRACES[name].mean / WEIGHTS[name] * error, rel=1e-12)
    linear = damage_table(model, {name: trace.mean for name, trace in TRACES.items()}, "linear")
    assert linear["main"][4] == pytest.approx(-3.0 / WEIGHTS["main"] * 4)


def test_a_trace_below_zero_gets_what_bits_are_left(model):
    negative = {**TRACES, "side": Trace(-5.0, 9.0)}
    table = damage_table(model, negative)
    assert 0 < table["side"][2] < 1e-4 * min(table["main"][2], table["after"][2])
    (everything,) = bs.search(model, negative, budgets=[8])
    assert everything.assignment.uniform == 8
    assert bs.search(model, negative, budgets=[5])[0].assignment["side"] == 2
    (everything,) = bs.search(model, dict.fromkeys(TRACES, -1.0), budgets=[8])
    assert everything.assignment.uniform == 8


def test_small_traces_are_told_apart(model):
    """A trace above 0 counts as it is, however far below the greatest."""
    table = damage_table(model, {"main": 1e4, "side": 1e-6, "after": 1e-9})
    for name, trace in (("side", 1e-6), ("after", 1e-9)):
        errors = model.get_submodule(name).squared_errors()
        for width in WIDTHS:
            assert table[name][width] == pytest.approx(trace / WEIGHTS[name] * errors[width], rel=1e-12)
    below = damage_table(model, {"main": 1e4, "side": -1.0, "after": 1e-9})
    per_error = [below[name][2] / model.get_submodule(name).squared_errors()[2] for name in ("side", "after")]
    assert 0 < per_error[0] <= per_error[1] * (1 + 1e-12)


class Positions(nn.Module):
    """Layers that read learned positions, sequences first, as attention does, and every second image."""

    def __init__(self, positions):
        super().__init__()
        self.first, self.positions = nn.Linear(4, 8), nn.Parameter(torch.randn(positions, 8))
        self.learned, self.rows, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.some = nn.Linear(8, 8)

    def forward(self, x):
        rows = self.rows(self.first(x).relu().expand(5, *x.shape[:1], 8)).mean(0)
        some = self.some(rows[: (len(rows) + 1) // 2]).mean()
        return self.last((rows @ self.learned(self.positions).T + some).relu() @ self.positions)


@pytest.mark.parametrize("positions", [5, 64])
def test_operations_are_of_one_image_whatever_the_batch(positions):
    torch.manual_seed(0)
    x = torch.randn(65, 4)
    model = bs.quantize(Positions(positions), bits=WIDTHS, example_inputs=x, keep=("positions",))
    for images in (1, 9, 41, 65):
        found = {name: cost.macs for name, cost in layer_costs(model, (x[:images],)).items()}
        # Of several images the share that the layer reads.
        some = 8 * ((images + 1) // 2) // images * 8
        assert found == {"learned": positions * 64, "rows": 5 * 64, "some": some}


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ({"main": 1.0, "side": 1.0}, "lack layer 'after'"),
        ({"main": 1.0, "sides": 1.0, "after": 1.0}, "did you mean 'sides'"),
        ({**TRACES, "side": float("nan")}, "trace of layer 'side' is nan"),
        ({**TRACES, "side": Trace(float("inf"), 1.0)}, "take the traces again"),
    ],
)
def test_traces_of_another_model(model, traces, message):
    with pytest.raises(UserError, match=message):
        bs.search(model, traces)


def test_operations_of_no_image(model):
    with pytest.raises(UserError, match="no image"):
        bs.search(model, TRACES, budgets=[{"bitops": 1e9}], example_inputs=X[:0])


@pytest.mark.parametrize(("traces", "words"), [([1, 2], "traces is a list"), ({"main": (1, 2)}, "'main' is")])
def test_traces_that_are_none(model, traces, words):
    with pytest.raises(UserError, match=words):
        bs.search(model, traces)


def test_layers_of_one_weight_and_layers_called_by_keyword(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.c.weight = self.b.weight

        def forward(self, x):
            x = self.a(x).relu()
            return self.d(self.b(input=x) + self.c(input=x))

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = bs.quantize(Tied(), bits=WIDTHS, example_inputs=x)
    assert shared_inputs(model, (x,)) == [["b", "c"]]
    bs.save(model, tmp_path / "m")
    tables = [cost_tables(one, (x,)) for one in (model, bs.load(tmp_path / "m", model=Tied()))]
    # Two layers of 64 codes, and beside them 2 layers of 72 float numbers, 2 biases of 8, and scales.
    numbers = 2 * 72 + 2 * 8 + 2 * (1 + len(WIDTHS))
    for table in tables:
        assert sum(table["bytes"][name][2] for name in "bc") == 2 * 64 * 2 // 8 + 4 * numbers


def test_search_is_the_programme_over_these_tables(model):
    damage, tables = damage_table(model, TRACES), cost_tables(model, (X,))

    def cost(widths, name):
        return sum(tables[name][layer][w] for layer, w in widths.items())

    def best(budgets):
        allowed = [c for c in all_choices() if all(cost(c, n) <= most + 1e-9 for n, most in budgets.items())]
        return min(sum(damage[layer][w] for layer, w in c.items()) for c in allowed)

    budgets = [4, 5.5, {"bitops": 1e5}, {"bits": 6, "bytes": 3000}]
    for budget in budgets:
        (choice,) = bs.search(model, TRACES, budgets=[budget], example_inputs=X)
        limits = budget if isinstance(budget, dict) else {"bits": budget}
        assert choice.damage == pytest.approx(best(limits))
        assert all(choice.cost[name] <= most + 1e-9 for name, most in limits.items())
    whole = bs.search(model, TRACES, example_inputs=X)
    assert whole[0].assignment.uniform == 8 and whole[-1].assignment.uniform == 2
    assert [c.damage for c in whole] == sorted(c.damage for c in whole)


def test_uniform_widths_meet_their_own_average():
    """Eighteen times 4/18 is more than 4 in floating point."""
    for layers in range(2, 60):
        names = [str(i) for i in range(layers)]
        tables = {"bits": {n: {w: w / layers for w in (8, 4)} for n in names}}
        problem = Problem(damage={n: {8: 0.0, 4: 1.0} for n in names}, costs=tables)
        assert problem.solve({"bits": 4}).assignment.uniform == 4


def test_a_sensitive_layer_gets_the_higher_width(model):
    for dominant in WEIGHTS:
        traces = {name: 1e4 if name == dominant else 1.0 for name in WEIGHTS}
        for form in ("hessian", "linear"):
            for choice in bs.search(model, traces, budgets=[3, 4, 5, 6], damage=form):
                assert choice.assignment[dominant] == max(choice.assignment.values())


def test_tied_layers_have_one_width(model):
    assert shared_inputs(model, (X,)) == [["main", "side"]]
    for choice in bs.search(model, TRACES, tied=shared_inputs(model, (X,))):
        assert choice.assignment["main"] == choice.assignment["side"]
    assert any(c.assignment["main"] != c.assignment["side"] for c in bs.search(model, TRACES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [1.5]}, "can be from 2 to 8"),
        ({"budgets": [{"bits": 4, "bytes": 1}]}, "together"),
        ({"budgets": [{"byte": 4}]}, "did you mean 'bytes'"),
        ({"damage": "hesian"}, "did you mean 'hessian'"),
        ({"tied": [["main", "sid"]]}, "did you mean 'side'"),
        ({"tied": ["main", "side"]}, r"tied=\['main', 'side'\]: give groups"),
        ({"example_inputs": [X]}, "example_inputs is a list"),
        ({"latency": {"main": {8: 1.0}}}, "'latency' lacks 4 bits of layer 'main'"),
        ({"latency": {"main": dict.fromkeys(WIDTHS, 1.0), "side": dict.fromkeys(WIDTHS, 1.0)}}, "lacks layer 'after'"),
        ({"latency": {n: dict.fromkeys(WIDTHS, -1.0) for n in WEIGHTS}}, "below 0"),
        ({"latency": {n: dict.fromkeys(WIDTHS, float("nan")) for n in WEIGHTS}}, "nan"),
        ({"latency": {n: dict.fromkeys(WIDTHS, 1.0) for n in (*WEIGHTS, "x")}}, "'x' of another network"),
    ],
)
def test_what_cannot_be_searched(model, options, message):
    with pytest.raises(UserError, match=message) as error:
        bs.search(model, TRACES, **options)
    assert "\n" not in str(error.value)


def test_a_latency_file(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"layers": {"a": {"8": 1, "4": 0.5}}}))
    assert read_latency(path) == {"a": {8: 1.0, 4: 0.5}}
    path.write_text(json.dumps({"latency": {"layers": {"a": {"8": 1}}}, "machine": {}}))
    assert read_latency(path) == {"a": {8: 1.0}}
    for text in ("[]", "{}", '{"layers": {"a": {"x": 1}}}', '{"layers": {"a": 3}}', "nonsense"):
        path.write_text(text)
        with pytest.raises(UserError):
            read_latency(path)
    with pytest.raises(UserError, match="cannot read"):
        read_latency(tmp_path / "none.json")


def test_measured_damage_changes_one_layer_at_a_time(model):
    asked = []

    def score(assignments):
        asked.extend(assignments)
        return [sum(one.values()) + 10.0 * (one["side"] == 2) for one in assignments]

    table = measured_damage(model, score)
    assert table["main"] == {8: 0.0, 4: 4.0, 2: 6.0} and table["side"] == {8: 0.0, 4: 4.0, 2: -4.0}
    assert all(sum(width != 8 for width in one.values()) <= 1 for one in asked) and len(set(asked)) == len(asked) == 7


def genetic_problem():
    draw = np.random.default_rng(0)
    names = [f"l{i}" for i in range(6)]
    damage = {n: {8: 0.0, 4: float(draw.random()), 2: 1 + float(draw.random())} for n in names}
    return Problem(damage=damage, costs={"bits": {n: {w: w / 6 for w in WIDTHS} for n in names}})


def test_genetic_refinement_finds_what_damage_does_not_tell():
    problem = genetic_problem()
    wanted = Assignment(tuple((name, (8, 2)[i % 2]) for i, name in enumerate(problem.damage)))
    asked = []

    def score(assignments):
        asked.extend(assignments)
        return [float(sum(one[n] == wanted[n] for n in wanted)) for one in assignments]

    found = refine(problem, {"bits": 5}, score, evaluations=300, seed=1)
    assert found[0][0].assignment == wanted and found[0][1] == 6.0
    assert len(asked) == len(set(asked)) == len(found) <= 300
    assert all(choice.cost["bits"] <= 5 + 1e-9 for choice, _ in found)
    assert [value for _, value in found] == sorted((v for _, v in found), reverse=True)
    assert [c.assignment for c, _ in refine(problem, {"bits": 5}, score, evaluations=300, seed=1)] == [
        c.assignment for c, _ in found
    ]


def test_genetic_refinement_keeps_ties_and_its_budget_of_evaluations():
    problem = genetic_problem()
    tied = Problem(damage=problem.damage, costs=problem.costs, tied=[["l0", "l5"], ["l5", "l2"]])
    found = refine(tied, {"bits": 5}, lambda some: [-float(one["l1"]) for one in some], evaluations=40)
    assert len(found) == 40
    assert all(c.assignment["l0"] == c.assignment["l5"] == c.assignment["l2"] for c, _ in found)


def test_genetic_refinement_ends_where_nothing_is_left():
    names = ["a", "b"]
    problem = Problem(damage={n: {8: 0.0, 2: 1.0} for n in names}, costs={"bits": {n: {8: 4.0, 2: 1.0} for n in names}})
    assert len(refine(problem, {"bits": 8}, lambda some: [0.0] * len(some), evaluations=1000)) == 4


def test_the_package_is_the_function():
    code = "import bitswitch as bs, torch; bs.search(torch.nn.Linear(1, 1), {})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Linear has no quantized layer" in result.stderr
    assert bs.search is search and callable(bs.search)
    assert search.find.__module__ == "bitswitch.search.find"


@pytest.mark.parametrize("budgets", [3, {"bits": 3}, "avg<=4"])
def test_budgets_that_are_no_list_are_told(budgets):
    with pytest.raises(UserError, match="give a list, such as"):
        search.as_budgets(budgets)


@pytest.mark.parametrize("budget", [None, [3, 4], "4", "avg<=4", {"bits": "4"}, {"bits": None}])
def test_a_budget_that_is_no_number_is_told(budget):
    with pytest.raises(UserError, match="is neither a number nor"):
        search.as_budgets([4, budget])


def test_budgets_of_any_kind_of_number():
    assert (
        search.as_budgets(torch.tensor([3.0, 4.0])) == search.as_budgets(np.array([3, 4])) == [{"bits": 3}, {"bits": 4}]
    )
    assert search.as_budgets([{"avg": 4, "bytes": np.float32(9)}]) == [{"bits": 4, "bytes": 9}]
    assert search.as_budgets([{"avg": 3, "bits": 7}, {"bits": 3, "avg": 7}]) == [{"bits": 3}] * 2


class OfDictionary(nn.Module):
    """Images come in a dictionary."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, inputs):
        return self.block(inputs["pixels"])


def test_operations_are_counted_for_one_image_of_a_dictionary():
    model = bs.quantize(OfDictionary(), bits=WIDTHS, example_inputs=({"pixels": X},))
    found = layer_costs(model, ({"pixels": X},))
    assert {name.removeprefix("block."): cost.macs for name, cost in found.items()} == MACS


@pytest.mark.parametrize("inputs", [(5,), (torch.tensor(1.0),), ({},)])
def test_example_inputs_without_a_batch_are_told(model, inputs):
    with pytest.raises(UserError, match="hold no image"):
        layer_costs(model, inputs)


class Tied(nn.Sequential):
    """The first layer, which stays float, and the second share a weight; and there is a state that is no tensor."""

    def __init__(self):
        super().__init__(*(nn.Linear(16, 16) for _ in range(4)))
        self[1].weight = self[0].weight

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_a_float_layers_weight_costs_bytes_though_a_quantized_one_shares_it():
    x, tied = torch.randn(8, 16), Tied()
    apart = copy.deepcopy(tied)
    apart[1].weight = nn.Parameter(tied[0].weight.detach().clone())
    one, other = (cost_tables(bs.quantize(net, bits=WIDTHS, example_inputs=x))["bytes"] for net in (tied, apart))
    assert one == other


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"after": None}, "table 'damage' lacks layer 'after'"),
        ({"main": {"8": 1.0}}, r"table 'damage' has '8' bits for layer 'main': there are \[8, 4, 2\]"),
        ({"main": {8: 0.0, 6: 1.0}}, "table 'damage' has 6 bits for layer 'main'"),
        ({"main": {8: "0"}}, "table 'damage' holds 0 for layer 'main'"),
        ({"main": [1.0]}, "table 'damage' gives layer 'main' a list"),
    ],
)
def test_a_damage_table_of_ones_own_is_told_of_by_its_name(model, changed, told):
    table = {name: {8: 0.0, 4: 1.0, 2: 2.0} for name in WEIGHTS} | changed
    with pytest.raises(UserError, match=told):
        bs.search(model, {}, budgets=[4], damage={name: row for name, row in table.items() if row is not None})


def test_a_damage_table_of_numpy_numbers_can_be_stored(model, tmp_path):
    table = {name: {np.int64(8): np.float32(0), np.int64(2): torch.tensor(1.0)} for name in WEIGHTS}
    found = bs.search(model, {}, budgets=[8], damage=table)
    bs.save(model, tmp_path / "a.safetensors", frontier=found)
    assert set(found[0].assignment.to_json().values()) == {8}

"""What a traced function costs on one device: memory, products, bytes between devices; read off its jaxpr.

Nothing is compiled and nothing runs, so the model of costs has no second description of the network to keep up with:
whatever the step does (remat, packed weights, logits in chunks) is in its jaxpr. What XLA will do with it is modelled:

  - Element-wise operations are fused into what consumes them. A value exists in memory if an operation that cannot
    take it on the fly needs it (a product, a loop, a collective), or if it is the result of one.
  - A value lives from the operation that makes it to the last one that reads it, or reads what is computed from it on
    the fly. An element-wise result takes the place of an operand that ends with it.
  - A loop holds what its iterations stack from its beginning on, and its carry in one place.
  - Arguments are not counted: they are known to the byte from their shapes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal, Var

from difflm_jax.ops.attention_kernels import CUDNN_BACKWARD, CUDNN_FORWARD, PALLAS_CALL

# Operations that XLA computes wherever their result is read.
_FUSED = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "concatenate",
    "convert_element_type", "copy", "copy_p", "cos", "div", "dynamic_slice", "eq", "erf", "exp", "expand_dims", "floor",
    "ge", "gt", "integer_pow", "iota", "is_finite", "layout_constraint", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "not", "optimization_barrier", "or", "pad", "pow", "pvary", "reduce_precision", "rem",
    "reshape", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
    "slice", "split", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor",
    "random_wrap", "random_unwrap", "random_fold_in", "random_seed", "random_split", "axis_index",
    "dynamic_update_slice", "scatter", "scatter-add",
}  # fmt: skip
# The same, but for XLA's CPU backend, which draws in a loop of its own, and copies what changes its type.
_FUSED_BUT_ON_CPUS = {"random_bits", "bitcast_convert_type"}

# Products of [T, S, E] for each head of the queries in a fused kernel: the backward pass makes the scores again.
_FUSED_ATTENTION = {CUDNN_FORWARD: 2, CUDNN_BACKWARD: 5}

# Operations that take their operands on the fly, and whose results are in memory.
_READERS = {
    "argmax", "argmin", "gather", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum", "reduce_prod",
}  # fmt: skip

# Collectives, and how often a device's operand or result passes through its links: a ring of n devices moves (n - 1)/n
# of it, a sum over all devices twice that (reduce, then gather).
_COLLECTIVES = {
    "all_gather": ("all-gather", 1.0, "result"),
    "all_gather_invariant": ("all-gather", 1.0, "result"),
    "reduce_scatter": ("reduce-scatter", 1.0, "operand"),
    "all_to_all": ("all-to-all", 1.0, "result"),
    "ppermute": ("collective-permute", 1.0, "result"),
    "psum": ("all-reduce", 2.0, "result"),
    "psum2": ("all-reduce", 2.0, "result"),
    "psum_invariant": ("all-reduce", 2.0, "result"),
    "pmax": ("all-reduce", 2.0, "result"),
    "pmin": ("all-reduce", 2.0, "result"),
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in memory; `stacked` over how many iterations of a loop."""

    shape: tuple[int, ...]
    dtype: str
    size: int  # bytes
    stacked: int = 0


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective: bytes of its result on a device, devices that take part, and how often it runs."""

    kind: str
    size: int
    operand: int
    devices: int
    times: int

    @property
    def link_bytes(self) -> float:
        """Bytes that a device receives, all times together (a ring)."""
        weight, of = next((w, of) for kind, w, of in _COLLECTIVES.values() if kind == self.kind)
        return self.times * weight * (self.size if of == "result" else self.operand) * (1 - 1 / self.devices)


@dataclasses.dataclass(frozen=True)
class Costs:
    """`peak`: bytes of temporaries at the worst moment, `live` what they are then. `flops` of all products, and the
    bytes of their operands and results."""

    peak: int
    live: tuple[Buffer, ...]
    flops: float
    product_bytes: float
    transfers: tuple[Transfer, ...]


def costs(jaxpr: Any, axis_sizes: dict[str, int], loop_trips: int, on_cpu: bool = False) -> Costs:
    """The costs of one device of a traced function (`jitted.trace(...).jaxpr`) on a mesh of `axis_sizes`.

    `loop_trips`: how often the body of a loop runs whose end depends on data. `on_cpu`: as XLA's CPU
    backend computes it. Of a function of `jax.shard_map`, what one device does is counted.
    """
    return _Analysis(axis_sizes, loop_trips, on_cpu).of(jaxpr.jaxpr, range(0))


@dataclasses.dataclass
class _Node:
    name: str
    params: dict[str, Any]
    inputs: list[int]
    outputs: list[int]


class _Program:
    """A jaxpr with its calls inlined: nodes over numbered values."""

    def __init__(self, jaxpr: Any):
        self.avals: list[Any] = []
        self.nodes: list[_Node] = []
        self.external: set[int] = set()
        self.constant: set[int] = set()  # known without any argument: never held across a loop
        names = {var: self._new(var.aval, external=True) for var in (*jaxpr.constvars, *jaxpr.invars)}
        self.inputs = [names[var] for var in jaxpr.invars]
        self._inline(jaxpr, names)
        self.outputs = [self._read(var, names) for var in jaxpr.outvars]

    def _new(self, aval: Any, external: bool = False) -> int:
        self.avals.append(aval)
        if external:
            self.external.add(len(self.avals) - 1)
        return len(self.avals) - 1

    def _read(self, atom: Any, names: dict[Var, int]) -> int:
        if not isinstance(atom, Literal):
            return names[atom]
        self.constant.add(len(self.avals))
        return self._new(atom.aval, external=True)

    def _inline(self, jaxpr: Any, names: dict[Var, int]) -> None:
        for eqn in jaxpr.eqns:
            inputs = [self._read(atom, names) for atom in eqn.invars]
            inner = _called(eqn)
            if inner is None:
                outputs = [self._new(var.aval) for var in eqn.outvars]
                self.nodes.append(_Node(eqn.primitive.name, eqn.params, inputs, outputs))
                if eqn.primitive.name in _FUSED and self.constant.issuperset(inputs):
                    self.constant.update(outputs)
            else:
                if eqn.primitive.name == "shard_map":  # the same arguments, with one device's shapes
                    inputs = [self._new(var.aval, external=True) for var in inner.invars]
                within = dict(zip(inner.invars, inputs, strict=True))
                within |= {var: self._new(var.aval, external=True) for var in inner.constvars}
                self._inline(inner, within)
                outputs = [self._read(atom, within) for atom in inner.outvars]
            names.update(zip(eqn.outvars, outputs, strict=True))

    def without_dead_nodes(self, wanted: Iterable[int]) -> list[_Node]:
        """The nodes that lead to `wanted` values, in order."""
        needed, kept = set(wanted), []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        return kept[::-1]


def _called(eqn: Any) -> Any | None:
    """The jaxpr of a call, whose variables are those of the equation; None for an operation or a loop."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None


# Operations that give the same bytes in another shape or type.
_ALIASES = {
    "copy", "copy_p", "expand_dims", "layout_constraint", "optimization_barrier", "pvary", "reshape", "squeeze",
    "stop_gradient", "transpose", "random_wrap", "random_unwrap",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Analysis:
    axis_sizes: dict[str, int]
    loop_trips: int
    on_cpu: bool

    def of(self, jaxpr: Any, sliced: Sequence[int], wanted: Sequence[int] | None = None) -> Costs:
        """The costs of one run of `jaxpr`. Its inputs at `sliced` are parts of stacks, read where they are needed;
        of its outputs those at `wanted` are used (None: all)."""
        program = _Program(jaxpr)
        for index in sliced:
            program.external.discard(program.inputs[index])
            program.nodes.insert(0, _Node("slice", {}, [], [program.inputs[index]]))
        outputs = program.outputs if wanted is None else [program.outputs[i] for i in wanted]
        for node in program.nodes:
            if node.name in _COLLECTIVES and self._devices(node) == 1:
                node.name = "copy"
        nodes = program.without_dead_nodes(outputs)
        inner = [self._inside(node, program) for node in nodes]
        memory = _Memory(program, nodes, outputs, self._is_fused)
        peak, live = memory.peak([(each.peak, each.live) if each else (0, ()) for each in inner])
        flops, moved, transfers = 0.0, 0.0, []
        for node, each in zip(nodes, inner, strict=True):
            if each is not None:
                flops, moved = flops + each.flops, moved + each.product_bytes
                transfers += each.transfers
            elif node.name == "dot_general" or node.name in _FUSED_ATTENTION:
                flops += _product_flops(node, program)
                moved += sum(_size(program.avals[value]) for value in (*node.inputs, *node.outputs))
            elif node.name == PALLAS_CALL:
                flops += node.params["cost_estimate"].flops
                moved += node.params["cost_estimate"].bytes_accessed
            elif node.name in _COLLECTIVES:
                transfers += self._transfers(node, program)
        return Costs(peak, live, flops, moved, tuple(transfers))

    def _is_fused(self, name: str) -> bool:
        return name in _FUSED or (name in _FUSED_BUT_ON_CPUS and not self.on_cpu)

    def _inside(self, node: _Node, program: _Program) -> Costs | None:
        """Of all iterations of a loop, or of the costlier branch; None where nothing is inside."""
        if node.name in ("scan", "while"):
            consts = _loop_constants(node)
            sliced = [at for at, value in enumerate(consts) if value in program.constant]
            if node.name == "while":
                return _repeated(self.of(node.params["body_jaxpr"].jaxpr, sliced), self.loop_trips)
            body = node.params["jaxpr"].jaxpr
            sliced += range(len(consts) + node.params["num_carry"], len(body.invars))
            return _repeated(self.of(body, sliced), node.params["length"])
        if node.name == "cond":
            branches = [self.of(branch.jaxpr, ()) for branch in node.params["branches"]]
            costliest = max(branches, key=lambda each: each.flops)
            largest = max(branches, key=lambda each: each.peak)
            return dataclasses.replace(costliest, peak=largest.peak, live=largest.live)
        return None

    def _devices(self, node: _Node) -> int:
        """How many take part in a collective."""
        axes = node.params.get("axes", node.params.get("axis_name"))
        return math.prod(self.axis_sizes[axis] for axis in (axes if isinstance(axes, (tuple, list)) else (axes,)))

    def _transfers(self, node: _Node, program: _Program) -> list[Transfer]:
        devices, kind = self._devices(node), _COLLECTIVES[node.name][0]
        sizes = [(_size(program.avals[i]), _size(program.avals[o]))
                 for i, o in zip(node.inputs, node.outputs, strict=True)]  # fmt: skip
        return [Transfer(kind, result, operand, devices, 1) for operand, result in sizes]


def _loop_constants(node: _Node) -> list[int]:
    """What the body of a loop reads and no iteration changes; nothing for other nodes."""
    if node.name == "scan":
        return node.inputs[: node.params["num_consts"]]
    if node.name == "while":
        skipped = node.params["cond_nconsts"]
        return node.inputs[skipped : skipped + node.params["body_nconsts"]]
    return []


def _repeated(once: Costs, times: int) -> Costs:
    transfers = tuple(dataclasses.replace(each, times=each.times * times) for each in once.transfers)
    return dataclasses.replace(
        once, flops=once.flops * times, product_bytes=once.product_bytes * times, transfers=transfers
    )


class _Memory:
    """Which values of a program exist in memory, and from when to when."""

    def __init__(self, program: _Program, nodes: list[_Node], outputs: Sequence[int], is_fused: Any):
        self._avals, self._constant = program.avals, program.constant
        self._external, self._is_fused = program.external, is_fused
        self._alias: dict[int, int] = {}
        for node in nodes:
            if node.name in _ALIASES or self._keeps_type(node):
                self._alias |= dict(zip(node.outputs, map(self._resolved, node.inputs), strict=False))
        self._nodes = [node for node in nodes if node.outputs[0] not in self._alias]
        self._positions = [i for i, node in enumerate(nodes) if node.outputs[0] not in self._alias]
        self._outputs = {self._resolved(value) for value in outputs}
        self._end_of_program = len(nodes)
        self._in_memory = self._materialised()
        self._begins, self._ends = self._lifetimes()

    def peak(self, inner: list[tuple[int, tuple[Buffer, ...]]]) -> tuple[int, tuple[Buffer, ...]]:
        """(bytes, what is live) at the worst moment; `inner`: the same within each node."""
        change = np.zeros(self._end_of_program + 2, np.int64)
        for value in self._in_memory:
            size = _size(self._avals[value])
            change[self._begins[value]] += size
            change[self._ends[value] + 1] -= size
        usage = np.cumsum(change)[: self._end_of_program + 1]
        for node, at in zip(self._nodes, self._positions, strict=True):
            usage[at] += inner[at][0] - self._reused(node, at)
        worst = int(usage.argmax())
        live = [value for value in self._in_memory if self._begins[value] <= worst <= self._ends[value]]
        within = inner[worst][1] if worst < len(inner) else ()
        return int(usage[worst]), (*(self._buffer(value) for value in live), *within)

    def _resolved(self, value: int) -> int:
        return self._alias.get(value, value)

    def _keeps_type(self, node: _Node) -> bool:
        """A conversion to the type that the value has."""
        return node.name == "convert_element_type" and (
            self._avals[node.inputs[0]].dtype == self._avals[node.outputs[0]].dtype
        )

    def _materialised(self) -> set[int]:
        """Values that some operation cannot take on the fly, and results of operations that are not fused."""
        found = set()
        for node in self._nodes:
            if not self._is_fused(node.name):
                found.update(node.outputs)
                if node.name not in _READERS:
                    needless = self._constant.intersection(_loop_constants(node))
                    found.update(self._resolved(value) for value in node.inputs if value not in needless)
        return found - self._external

    def _lifetimes(self) -> tuple[dict[int, int], dict[int, int]]:
        roots: dict[int, frozenset[int]] = {}
        first_use: dict[int, int] = {}
        made: dict[int, int] = {}
        for node, at in zip(self._nodes, self._positions, strict=True):
            read = frozenset().union(*(self._roots_of(value, roots) for value in node.inputs))
            for value in node.outputs:
                roots[value] = frozenset((value,)) if value in self._in_memory else read
                made[value] = at
        # When each node runs: what is cheaper to hold as its operands is made when it is first read.
        runs: dict[int, int] = {}
        for node, at in zip(reversed(self._nodes), reversed(self._positions), strict=True):
            when = at
            if self._is_fused(node.name):
                own = sum(_size(self._avals[value]) for value in node.outputs)
                read = frozenset().union(*(self._roots_of(value, roots) for value in node.inputs))
                held = self._in_memory.intersection(node.outputs)
                if not held or sum(_size(self._avals[root]) for root in read) < own:
                    uses = [first_use[value] for value in node.outputs if value in first_use]
                    when = max(at, min(uses, default=at))
            runs[at] = when
            for value in map(self._resolved, node.inputs):
                first_use[value] = min(first_use.get(value, self._end_of_program), when)
        begins = {value: runs[made[value]] for value in self._in_memory}
        ends = dict(begins)
        for node, at in zip(self._nodes, self._positions, strict=True):
            virtual = self._is_fused(node.name) and not self._in_memory.intersection(node.outputs)
            if virtual and not self._outputs.intersection(node.outputs):
                continue  # read by what is made of it
            for value in node.inputs:
                for root in self._roots_of(value, roots):
                    ends[root] = max(ends[root], runs[at])
        for value in self._outputs:
            for root in self._roots_of(value, roots):
                ends[root] = self._end_of_program
        return begins, ends

    def _roots_of(self, value: int, roots: dict[int, frozenset[int]]) -> frozenset[int]:
        return roots.get(self._resolved(value), frozenset())

    def _reused(self, node: _Node, at: int) -> int:
        """Bytes of the results of a node that take the place of operands which end with it."""
        if not (self._is_fused(node.name) or node.name in ("scan", "while")):
            return 0
        results = [value for value in node.outputs if value in self._in_memory and self._begins[value] == at]
        ending = [v for v in {self._resolved(v) for v in node.inputs}
                  if v in self._in_memory and self._ends[v] == at]  # fmt: skip
        reused, sizes = 0, [_size(self._avals[v]) for v in ending]
        for value in results:
            size = _size(self._avals[value])
            if size in sizes:
                sizes.remove(size)
                reused += size
        return reused

    def _buffer(self, value: int) -> Buffer:
        aval = self._avals[value]
        maker = next((n for n in self._nodes if value in n.outputs), None)
        stacked = 0
        if maker is not None and maker.name == "scan" and maker.outputs.index(value) >= maker.params["num_carry"]:
            stacked = maker.params["length"]
        return Buffer(tuple(aval.shape), str(aval.dtype), _size(aval), stacked)


def _size(aval: Any) -> int:
    """Bytes of an array; a key counts as its words."""
    if not hasattr(aval, "shape"):
        return 0
    itemsize = getattr(aval.dtype, "itemsize", 0) or 8
    return math.prod(aval.shape) * itemsize


def _product_flops(node: _Node, program: _Program) -> float:
    left = program.avals[node.inputs[0]].shape
    if node.name in _FUSED_ATTENTION:
        keys = program.avals[node.inputs[1]].shape[1]
        return 2.0 * _FUSED_ATTENTION[node.name] * math.prod(left) * keys
    (contracted, _), _ = node.params["dimension_numbers"]
    result = program.avals[node.outputs[0]].shape
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)

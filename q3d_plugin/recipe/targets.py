"""Which quantization an inference engine can run, as one table with the source of each line.

A simulated mAP is worth something only if the engine computes the same. So a recipe names its target, and
asking for anything that the target cannot run is an error before any data is read.
"""

from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

from q3d_plugin.recipe.specs import ActivationSpec, LayerPlan

__all__ = ['FAMILIES', 'TARGETS', 'Problem', 'Rule', 'Target']

FAMILIES = ('convolution', 'linear', 'sparse', 'elementwise', 'matmul')
"""Kinds of layers that engines treat differently: dense convolutions (transposed ones too), linear layers and
projections of attention, sparse convolutions, additions and concatenations, products of two activations."""


class Rule(NamedTuple):
    """One line of the table: the values that an entry of the recipe may have.

    Attributes:
        key: Dotted key of a layer's plan, such as ``activation.bits``.
        allowed: The values that the engine can run.
        reason: Why others cannot run.
        source: Where that is documented.
        families: The kinds of layers that the line is about.
        weight_only: Whether the line is about layers whose inputs stay float.
    """

    key: str
    allowed: Tuple[Any, ...]
    reason: str
    source: str
    families: Tuple[str, ...] = FAMILIES
    weight_only: bool = False

    def concerns(self, family: str, weight_only: bool) -> bool:
        """Whether the line is about such a layer."""
        return family in self.families and self.weight_only == weight_only


class Problem(NamedTuple):
    """An entry that a target cannot run.

    Attributes:
        key: Dotted key, such as ``activation.bits``.
        value: Its value.
        rule: The line of the table that forbids it.
    """

    key: str
    value: Any
    rule: Rule


_TENSORRT = 'TensorRT documentation, "Working with Quantized Types"'
_SPARSE = 'NVIDIA Lidar_AI_Solution, 3DSparseConvolution (libspconv): layers in INT8 or FP16'
_OPENVINO = 'OpenVINO documentation, "OpenVINO Low Precision Transformations"'
_ORT = 'ONNX Runtime documentation, "Quantize ONNX Models"'


@dataclass(frozen=True)
class Target:
    """An engine.

    Attributes:
        name: As in the recipe.
        rules: Lines of the table; an entry without a line may have any value.
        facts: What else holds there, as (fact, source): for export and for people.
    """

    name: str
    rules: Tuple[Rule, ...] = ()
    facts: Tuple[Tuple[str, str], ...] = ()

    @property
    def unsigned(self) -> bool:
        """Whether activations may be unsigned."""
        return all(True in rule.allowed for rule in self.rules if rule.key == 'activation.unsigned')

    def resolved(self, activation: Optional[ActivationSpec]) -> Optional[ActivationSpec]:
        """``activation`` with ``unsigned='auto'`` settled where the target leaves no choice."""
        if activation is None or activation.unsigned != 'auto' or self.unsigned:
            return activation
        return replace(activation, unsigned=False)

    def problems(self, plan: LayerPlan, family: str) -> Iterator[Problem]:
        """The entries of a layer's plan that the engine cannot run.

        Args:
            plan: Of the layer.
            family: One of :data:`FAMILIES`.
        """
        weight_only = plan.activation is None
        for rule in self.rules:
            if not rule.concerns(family, weight_only):
                continue
            value = _value(plan, rule.key)
            if value is not None and value not in rule.allowed:
                yield Problem(rule.key, value, rule)

    def anywhere(self, key: str, value: Any) -> Optional[Problem]:
        """The problem with a value that no layer of any kind could run; None where one could."""
        rules = [rule for rule in self.rules if rule.key == key]
        concerned = {family for rule in rules for family in rule.families}
        if not rules or concerned != set(FAMILIES) or any(value in rule.allowed for rule in rules):
            return None
        return Problem(key, value, rules[0])


def _value(plan: LayerPlan, key: str) -> Any:
    part, name = key.split('.')
    return getattr(getattr(plan, part), name, None)


def _common(source: str) -> Tuple[Rule, ...]:
    """Lines that hold for every engine here: the scales of Q/DQ pairs are constants of the graph."""
    return (
        Rule('activation.range', ('static',), 'scales are constants of the engine', source),
        Rule('smooth.mode', ('static',), 'scales from the running input change the weights', source),
    )


TARGETS: Dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            'tensorrt',
            (
                Rule(
                    'activation.unsigned',
                    (False, 'auto'),
                    'its INT8 is signed, and its parser refuses an unsigned QuantizeLinear',
                    'onnx/onnx-tensorrt pull request 886; NVIDIA/TensorRT issue 2081',
                ),
                Rule('activation.bits', (8,), 'its integers for activations have 8 bits', _TENSORRT),
                Rule('weight.bits', (8,), 'weights of layers with INT8 inputs have 8 bits', _TENSORRT),
                Rule(
                    'weight.bits',
                    (8, 4),
                    'INT4 is for the weights of matrix products alone',
                    _TENSORRT,
                    ('linear',),
                    weight_only=True,
                ),
                Rule(
                    'weight.bits',
                    (8,),
                    'INT4 is for the weights of matrix products alone',
                    _TENSORRT,
                    ('convolution', 'sparse', 'elementwise', 'matmul'),
                    weight_only=True,
                ),
                *_common(_TENSORRT),
            ),
            (
                ('zero points are 0', _TENSORRT),
                ('weights have one scale per output channel, inputs one per tensor', _TENSORRT),
                ('sparse layers run in its companion engine: signed, 8 bits, static', _SPARSE),
            ),
        ),
        Target(
            'openvino',
            (
                Rule('activation.bits', (8,), 'its integers have 8 bits (signed and unsigned)', _OPENVINO),
                Rule('weight.bits', (8,), 'its convolutions take weights of 8 bits', _OPENVINO),
                Rule('weight.bits', (8,), 'its layers take weights of 8 bits', _OPENVINO, weight_only=True),
                *_common(_OPENVINO),
            ),
            (
                ('inputs may be unsigned, weights are signed; zero points are 0 here', _OPENVINO),
                ('weights have one scale per output channel, inputs one per tensor', _OPENVINO),
                ('it has no sparse convolution: those run outside of it, with the same rules', _OPENVINO),
            ),
        ),
        Target(
            'onnxruntime',
            (
                Rule('activation.bits', (8,), 'its integer kernels have 8 bits (signed and unsigned)', _ORT),
                Rule('weight.bits', (8,), 'its convolutions take weights of 8 bits', _ORT),
                Rule('weight.bits', (8,), 'its layers take weights of 8 bits', _ORT, weight_only=True),
                *_common(_ORT),
            ),
            (
                ('inputs may be unsigned, weights are signed; zero points are 0 here', _ORT),
                ('weights have one scale per output channel, inputs one per tensor', _ORT),
                ('it has no sparse convolution: those run outside of it, with the same rules', _ORT),
            ),
        ),
        Target('simulation', (), (('no engine: everything that can be simulated', 'this plugin'),)),
    )
}
"""The engines by name."""

"""Forward passes that compute again only what depends on a changed layer.

A pass is recorded once: what every module was given, and what it returned. In a replay a module returns
what it returned before where it is given the same tensors and nothing below it has changed. So a changed
layer of one branch of a head costs that branch, and one of the neck costs neck and head.

What else a module does is done again, too: entries that it changes in dictionaries, tensors that it keeps in
itself, and what it writes into tensors that it is given.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Dict, List, Set, Tuple

import torch
from torch import Tensor, nn

from q3d_plugin.layers import QuantUnit

__all__ = ['Replay']


def _parts(value: Any, out: List) -> List:
    """The parts by which two arguments are told apart: tensors with their versions, and other objects."""
    if isinstance(value, Tensor):
        out.append((value, value._version))
    elif hasattr(value, 'features') and hasattr(value, 'indices'):  # a sparse tensor of spconv
        _parts(value.features, out)
        _parts(value.indices, out)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            out.append((key, None))
            _parts(item, out)
    elif isinstance(value, (list, tuple)):
        out.append((len(value), None))
        for item in value:
            _parts(item, out)
    else:
        out.append((value, None))
    return out


def _same(a: List, b: List) -> bool:
    if len(a) != len(b):
        return False
    for (x, version), (y, other) in zip(a, b):
        if x is y:
            if version != other:
                return False
        elif isinstance(x, Tensor) and isinstance(y, Tensor):
            # Detectors make voxels, their indices and the matrices of cameras anew in each pass. What differs
            # mostly differs at once, so that comparing costs little.
            if x._version != version or x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x, y):
                return False
        elif not (isinstance(x, (str, int, float, bool)) and type(x) is type(y) and x == y):
            return False
    return True


def _written(parts: List) -> List[Tuple[int, Tensor]]:
    """Place and value of every tensor among ``parts`` that was written into since they were noted."""
    return [(i, x) for i, (x, version) in enumerate(parts) if version is not None and x._version != version]


def _copied(parts: List) -> List:
    """``parts`` with copies of the tensors, which nobody writes into."""
    return [(x, v) if v is None else ((c := x.clone()), c._version) for x, v in parts]


class _Entry:
    """One call of a module: what came in, what went out, and what was changed on the way.

    Args:
        given: The parts of its arguments before the call.
        args: Its arguments after the call.
        before: Copies of those of them that are dictionaries, from before the call.
        output: What it returned.
        written: Place among the parts, and new value, of tensors that it wrote into.
        kept: Modules, names and values of tensors that it and those below it began to keep in themselves.
    """

    def __init__(
        self, given: List, args: tuple, before: List[Dict], output: Any, written: List, kept: List
    ) -> None:
        self.given, self.written, self.kept = given, written, kept
        self.changes = []
        for arg, old in zip(args, before):
            if old is not None:
                new = {k: v for k, v in arg.items() if k not in old or old[k] is not v}
                self.changes.append((new, [k for k in old if k not in arg]))
            else:
                self.changes.append(None)
        self.returned = next((i for i, arg in enumerate(args) if arg is output and self.changes[i]), None)
        self.output = None if self.returned is not None else output
        self.state = _parts([self.output, [c[0] for c in self.changes if c]], [])

    def intact(self) -> bool:
        """Whether nothing has written into the recorded tensors since."""
        return all(version is None or value._version == version for value, version in self.state)

    def apply(self, args: tuple, given: List) -> Any:
        """Does to ``args``, whose parts are ``given``, what the call did, and returns what it returned."""
        for place, value in self.written:
            given[place][0].copy_(value)
        for module, name, value in self.kept:
            setattr(module, name, value)
        for arg, change in zip(args, self.changes):
            if change is not None:
                arg.update(change[0])
                for key in change[1]:
                    arg.pop(key, None)
        return self.output if self.returned is None else args[self.returned]


class Replay:
    """Recorded passes of a model over one frame at a time.

    Within :meth:`installed` the model's modules are watched. Activations rectified in place would overwrite
    what was recorded, so ``inplace`` of such modules is off for that time.

    Args:
        model: In eval mode. What its modules compute depends on their arguments alone.
        forward: Runs the model on a batch; gives the same tensors to it each time it gets the same batch.

    Attributes:
        computed: Names of the quantized layers that the last :meth:`replay` computed.
    """

    def __init__(self, model: nn.Module, forward: Callable) -> None:
        self.model, self.forward = model, forward
        self.computed: List[str] = []
        self._entries: Dict[str, List[_Entry]] = {}
        self._recording = False
        self._stale: Set[str] = set()
        self._writers: Set[str] = set()
        self._kept: List[Tuple[nn.Module, str, Tensor]] = []

    @contextmanager
    def installed(self) -> Iterator['Replay']:
        """Watches the modules of the model while the context lasts."""
        watched, rectified = [], []
        inside: Set[nn.Module] = set()
        for module in self.model.modules():
            if isinstance(module, QuantUnit):
                # Its quantizers are part of it.
                inside.update(m for m in module.modules() if m is not module)
        for name, module in self.model.named_modules():
            if not name or module in inside or type(module).forward is nn.Module.forward:
                continue
            if getattr(module, 'inplace', None) is True:
                module.inplace = False
                rectified.append(module)
            if 'forward' not in module.__dict__:
                module.__dict__['forward'] = self._watching(name, module)
                watched.append(module)
        try:
            yield self
        finally:
            for module in watched:
                del module.__dict__['forward']
            for module in rectified:
                module.inplace = True
            self._entries = {}

    def record(self, batch: Any) -> Any:
        """Runs the model and remembers everything; what was recorded before is forgotten."""
        while True:
            known = len(self._writers)
            self._entries, self._recording, self._stale, self._kept = {}, True, set(), []
            try:
                outputs = self.forward(batch)
            finally:
                self._recording = False
            if len(self._writers) == known:
                return outputs
            # A module was found that writes into what it is given: once more, with copies of that.

    def replay(self, batch: Any, changed: Iterable[str]) -> Any:
        """Runs the model on the batch of the last :meth:`record`.

        Args:
            batch: The same object.
            changed: Names of the modules that compute otherwise than they did then.
        """
        # A module with a changed one inside is run again.
        self._stale = {'.'.join(n.split('.')[:i]) for n in changed for i in range(1, n.count('.') + 2)}
        self.computed = []
        return self.forward(batch)

    def _watching(self, name: str, module: nn.Module) -> Callable:
        forward = type(module).forward

        def watched(*args, **kwargs):
            if any(isinstance(v, dict) for v in kwargs.values()):
                return forward(module, *args, **kwargs)  # what it does to them is not recorded
            given = _parts([args, kwargs], [])
            if not self._recording:
                if name not in self._stale:
                    for entry in self._entries.get(name, ()):
                        if _same(entry.given, given) and entry.intact():
                            return entry.apply(args, given)
                if isinstance(module, QuantUnit):
                    self.computed.append(name)
                return forward(module, *args, **kwargs)
            before = [dict(arg) if isinstance(arg, dict) else None for arg in args]
            own, first = dict(module.__dict__), len(self._kept)
            noted = _copied(given) if name in self._writers else given
            output = forward(module, *args, **kwargs)
            written = [(i, x.clone()) for i, x in _written(given)]
            if written and noted is given:
                self._writers.add(name)
            for key, value in module.__dict__.items():
                if isinstance(value, Tensor) and own.get(key) is not value:
                    self._kept.append((module, key, value))
            entry = _Entry(noted, args, before, output, written, self._kept[first:])
            self._entries.setdefault(name, []).append(entry)
            return output

        return watched

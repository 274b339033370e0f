"""MMDetection3D adapter: ``custom_imports = dict(imports=['q3d_plugin.mmdet3d'])`` registers everything."""

from q3d_plugin.cpu import enable_cpu_mode

enable_cpu_mode()

from q3d_plugin.mmdet3d.blank import BlankSensor  # noqa: E402
from q3d_plugin.mmdet3d.checkpoints import trust_mmengine_checkpoints  # noqa: E402
from q3d_plugin.mmdet3d.hook import QuantHook  # noqa: E402
from q3d_plugin.mmdet3d.parts import register_parts  # noqa: E402
from q3d_plugin.mmdet3d.projects import prepare_bevfusion  # noqa: E402
from q3d_plugin.quantizer import ADVICE  # noqa: E402

prepare_bevfusion()
register_parts()
trust_mmengine_checkpoints()
ADVICE.append("Add custom_hooks = [dict(type='QuantHook', recipe=dict(...))] to the config (MMDetection3D)")

__all__ = ['BlankSensor', 'QuantHook', 'register_parts']

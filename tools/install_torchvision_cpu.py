"""Development only: puts `torchvision_cpu.py` into this interpreter's site-packages, where it runs at start-up."""

import shutil
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
shutil.copy(Path(__file__).with_name("torchvision_cpu.py"), site / "turbovlm_torchvision_cpu.py")
(site / "turbovlm_torchvision_cpu.pth").write_text("import turbovlm_torchvision_cpu\n")

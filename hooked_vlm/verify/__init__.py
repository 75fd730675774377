"""A user's own checkpoint, run here and in `transformers` side by side: `hooked-vlm verify MODEL`."""

from hooked_vlm.verify.command import VerifyConfig as VerifyConfig
from hooked_vlm.verify.command import verify as verify
from hooked_vlm.verify.result import Row as Row
from hooked_vlm.verify.result import Verification as Verification

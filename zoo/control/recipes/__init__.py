"""Recipes: one paper a file, in a few edits or functions; `RECIPES` has them by name."""

from ..registry import RECIPES, Recipe
from .all_to_first import all_to_first
from .astar import astar
from .attencraft import attencraft
from .attention_modulation import attention_modulation
from .attention_regulation import attention_regulation
from .bacon import bacon
from .break_a_scene import break_a_scene
from .broadway import broadway
from .c_upscale import c_upscale
from .consistedit import consistedit
from .creatidesign import creatidesign
from .cut_and_paste import cut_and_paste
from .designedit import designedit
from .diffuhaul import diffuhaul
from .ditctrl import ditctrl
from .ditraj import ditraj
from .dreamvideo2 import dreamvideo2
from .foveated import foveated
from .freecontrol import freecontrol
from .fulldit import fulldit
from .grad_sam import grad_sam
from .grag import grag
from .ir_diffusion import ir_diffusion
from .locatedit import locatedit
from .mask2dit import mask2dit
from .mmdit_edit import mmdit_edit
from .motionclr import motionclr
from .parts2whole import parts2whole
from .pfb_diff import pfb_diff
from .primecomposer import primecomposer
from .prompt_to_prompt import prompt_to_prompt
from .rag import rag
from .realcraft import realcraft
from .s2edit import s2edit
from .scaleweaver import scaleweaver
from .seg2any import seg2any
from .softpag import softpag
from .spacetime import spacetime
from .token_merging import token_merging
from .trajectory_attention import trajectory_attention
from .ultra3d import ultra3d
from .unifyedit import unifyedit
from .video_p2p import video_p2p
from .videograin import videograin
from .vimaedit import vimaedit

__all__ = [
    "RECIPES",
    "Recipe",
    "all_to_first",
    "astar",
    "attencraft",
    "attention_modulation",
    "attention_regulation",
    "bacon",
    "break_a_scene",
    "broadway",
    "c_upscale",
    "consistedit",
    "creatidesign",
    "cut_and_paste",
    "designedit",
    "diffuhaul",
    "ditctrl",
    "ditraj",
    "dreamvideo2",
    "foveated",
    "freecontrol",
    "fulldit",
    "grad_sam",
    "grag",
    "ir_diffusion",
    "locatedit",
    "mask2dit",
    "mmdit_edit",
    "motionclr",
    "parts2whole",
    "pfb_diff",
    "primecomposer",
    "prompt_to_prompt",
    "rag",
    "realcraft",
    "s2edit",
    "scaleweaver",
    "seg2any",
    "softpag",
    "spacetime",
    "token_merging",
    "trajectory_attention",
    "ultra3d",
    "unifyedit",
    "video_p2p",
    "videograin",
    "vimaedit",
]

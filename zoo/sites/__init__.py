"""Sites: where attention happens in the generators of diffusers, and how to do something else there.

from foveal.zoo import sites

for site in sites.find(pipe):
    print(site.path, site.kind, site.heads, site.streams)
with sites.Interception(pipe, attend, sites=sites.select(sites.find(pipe), kinds=["self", "joint"])):
    pipe(prompt)
"""

from .intercept import Call, Interception
from .layout import Layout
from .models import MODELS, find
from .schedule import Moment, Schedule
from .site import Operation, Site, select

__all__ = ["MODELS", "Call", "Interception", "Layout", "Moment", "Operation", "Schedule", "Site", "find", "select"]

"""`foveal demo`: a web page to look at the library with, served by Python's own HTTP server.

`panels.py` computes what the page shows, `server.py` answers its requests, `page.html` is all of it in the browser.
"""

from .panels import Panels
from .server import make_server

__all__ = ["Panels", "make_server"]

"""A page on run directories: `serve` and `serve_in_thread` show finished runs and those under way.

It knows of a run only what its directory holds, so a live run is a directory whose files grow.
"""

from rlsys.dashboard.server import Served, serve, serve_in_thread

__all__ = ["Served", "serve", "serve_in_thread"]

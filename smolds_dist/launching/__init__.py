"""How ranks are started, watched and ended, and whether a machine can."""

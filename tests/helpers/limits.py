"""The one time limit of the tests: a slow or busy machine makes them slower, never red."""

HANG_S = 1800
"""Seconds that a wait may take. The longest takes half a minute on two idle cores, and a machine
under sixty times the load it can bear ends it in time: what meets this limit hangs.

pytest's own limit on a whole test, in setup.cfg, is longer, so that the pool of ranks can say first
where each rank hangs.
"""

"""How the deployment is called, and which port of it asks what. A leaf: it imports nothing of Ray."""

APP = "embedyard"
DEPLOYMENT = "host"

STATS_PERIOD_S = 0.5
"""How often Serve's controller asks a host what is in memory, and tells the routers."""
HEALTH_PERIOD_S = 2.0
"""With Serve's 10 s a replacement answers after 9 s, with this after 3."""

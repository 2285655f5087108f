"""Callbacks for trainers, and names for timm. Each module needs its framework; this package needs none."""

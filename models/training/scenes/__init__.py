"""Moving scenes with exact masks, for training and testing video instance segmentation without a public data set.

A clip is one shot, or two with a cut between them. A shot has a large textured background with a moving camera over it,
unlabelled furniture (blobs and slabs), and up to five objects that move, turn, deform and cover one another in a fixed
order of depth. What an object is, is decided by its outline; by choice its texture tells it too, as fur tells a dog, or
misleads: an object may be painted like background and furniture. From the command line::

    python -m models.training.scenes data/scenes --clips 64 --frames 36 --size 288 512 --seed 0 --workers 2
"""

from __future__ import annotations

from models.training.scenes.config import CLASSES, SceneConfig
from models.training.scenes.files import write_youtube_vis
from models.training.scenes.shots import Clip, render_clip

__all__ = ["CLASSES", "Clip", "SceneConfig", "render_clip", "write_youtube_vis"]

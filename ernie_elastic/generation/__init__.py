"""The causal model and what it generates, group by group: text, pictures scale by scale, clips, sounds."""

import ernie_elastic.modeling  # noqa: F401 - its face hands on this room's model, so it must be whole before any file here

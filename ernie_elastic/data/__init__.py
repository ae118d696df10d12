"""Records of any origin become packed rows: `sources`, `media`, `groups`, `packed`, `prepare`, the embedded `world`."""

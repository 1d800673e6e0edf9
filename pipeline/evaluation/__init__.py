"""Tables and pictures that compare upsamplers on labelled images."""

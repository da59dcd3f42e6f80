"""All that inference needs: one image in, three landmarks and the angle of progression out."""

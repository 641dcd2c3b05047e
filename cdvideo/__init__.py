"""cdvideo: teach a text-to-image model one thing from a few photos, keep the meaning of its class, and film it.

Names of tensors carry their shape:

    B  batch           C  channels           L  text tokens           K  rows of a concept token
    F  frames          H, W  height, width   D  width of the text     R  rank of a low-rank adapter

so `latents_BFCHW` is a batch of films in latent space. Pixels are float32 in [-1, 1], latents are scaled by the VAE's
`scaling_factor`, frames for export are uint8 in [0, 255].

Importing the package loads no torch; each public name is imported when it is first used.
"""

"""Ways from images to two views on the device, chosen by name. Imports all other packages of `pipelines`."""

"""`phalanx bench comm`: what transfers take between the ranks of a layout, beside what physics allows."""

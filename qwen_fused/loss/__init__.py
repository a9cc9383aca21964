"""The fused expected-free-energy loss: public function, checks, autograd."""

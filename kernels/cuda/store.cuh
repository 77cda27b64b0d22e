// For kernels that stream: fd_put4 stores 16 bytes to global memory at once, whatever is stored beside it. A plain
// fd_store4 may become four stores there, since compilers first see four values in it. What is written before it stays
// before it, so what is read should be read earlier: fd_take4 reads 16 bytes, and is not moved behind a store.

#ifdef FD_HOST
#define fd_put4 fd_store4
#define fd_take4 fd_load4
#else
FD_DEVICE void fd_put4(float *p, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w)
                 : "memory");
}
FD_DEVICE float4 fd_take4(const float *p) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    return v;
}
#endif

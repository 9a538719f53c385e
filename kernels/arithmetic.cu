// Arithmetic with broadcasting: arithmetic.py has the formulas.
#include <loops.cuh>

enum { PLUS, TIMES, OVER };

// y = a + sign * b, a * b or a / b; W > 1: the inner loop steps through y by 1, and through a and b too, unless they repeat one element.
template <class Y, class A, class B, int W, bool A_REPEATS, bool B_REPEATS>
__global__ void __launch_bounds__(256) combine(Y* y, const A* a, const B* b, LOOP_SIZES, STEPS(y), STEPS(a), STEPS(b), long to, long a_from,
                                               long b_from, int operation, double sign) {
    typedef Wider<Y, Wider<A, B>> S;
    GRID_STRIDE(vector, vectors) {
        const Place at = place<W>(vector, n1, n2, n3);
        const auto left = load_or_repeat<A, W, A_REPEATS>(a + a_from + AT(at, a));
        const auto right = load_or_repeat<B, W, B_REPEATS>(b + b_from + AT(at, b));
        Vector<Y, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S u = S(left.e[k]), v = S(right.e[k]);
            out.e[k] = Y(operation == PLUS ? u + S(sign) * v : operation == TIMES ? u * v : u / v);
        }
        store<Y, W>(y + to + AT(at, y), out);
    }
}

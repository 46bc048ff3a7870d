// Ends the process some seconds after SIGTERM or SIGINT even if no Python code can run any more.
//
// Python's own handlers run between two bytecodes of the main thread. Code that holds the interpreter, such as
// one call of `re`, can keep them waiting indefinitely. Here the handler itself, which the kernel calls, sets an
// alarm before it passes the signal on to Python's handler; the alarm ends the process in any case.
#include <cstdint>

#if defined(_WIN32)
#define LOCALSTEER_API extern "C" __declspec(dllexport)
#else
#define LOCALSTEER_API extern "C" __attribute__((visibility("default")))
#endif

#if defined(_WIN32)

LOCALSTEER_API int32_t localsteer_end_after(int32_t, uint32_t, uint32_t) {
    return 1; // there is no alarm here
}

#else

#include <csignal>
#include <cstring>
#include <unistd.h>

namespace {

constexpr int n_signals = 65; // more than any system has
constexpr int status    = 1;

struct sigaction python_handlers[n_signals];
volatile unsigned seconds_first;
volatile unsigned seconds_again;
volatile sig_atomic_t n_received;

// all calls below are async-signal-safe

void on_alarm(int) {
    static const char text[] = "localsteer: did not end within its grace: stopped.\n";
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0) {
        // there is nobody to tell
    }
    _exit(status);
}

void on_signal(int number) {
    alarm(n_received++ == 0 ? seconds_first : seconds_again);
    python_handlers[number].sa_handler(number);
}

} // namespace

// Call it once Python's handler of `number` is in place: a later one would replace this.
// seconds_first: from the first signal; seconds_again: from every further one. 0 where it worked.
LOCALSTEER_API int32_t localsteer_end_after(int32_t number, uint32_t first, uint32_t again) {
    if (number <= 0 || number >= n_signals) {
        return 1;
    }
    struct sigaction before;
    if (sigaction(number, nullptr, &before) != 0 || (before.sa_flags & SA_SIGINFO) != 0 ||
        before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN || before.sa_handler == on_signal) {
        return 1;
    }
    seconds_first = first > 0 ? first : 1; // an alarm of 0 seconds is none
    seconds_again = again > 0 ? again : 1;
    python_handlers[number] = before;

    struct sigaction ends;
    memset(&ends, 0, sizeof(ends));
    ends.sa_handler = on_alarm;
    struct sigaction ours = before;
    ours.sa_handler = on_signal;
    return sigaction(SIGALRM, &ends, nullptr) != 0 || sigaction(number, &ours, nullptr) != 0;
}

#endif

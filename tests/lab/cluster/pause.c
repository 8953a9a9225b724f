/* What holds a pod's namespaces: waits to be told to end. */
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static void end(int signal) {
  (void)signal;
  exit(0);
}

int main(void) {
  signal(SIGTERM, end);
  signal(SIGINT, end);
  for (;;) pause();
}
